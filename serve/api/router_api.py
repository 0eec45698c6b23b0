"""HTTP routes of the router: the decision alone, its reasons, reload, drift.

`POST /v1/router/reload` validates before it swaps: a bad artifact leaves the old router in place and
gives an error in the OpenAI body.
"""

from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from deltamux.serve.api.active_router import ActiveRouter
from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.handlers import error_response
from deltamux.serve.api.state import server_state

routing_router = APIRouter(prefix="/v1")


class RouteBody(BaseModel):
    """`POST /v1/route`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    input: str | list[Any] | None = None
    explain: bool = False


class ReloadBody(BaseModel):
    """`POST /v1/router/reload`; without a path the directory in use is read again."""

    model_config = ConfigDict(extra="forbid")

    path: Path | None = None
    shadow: Path | None = None


def _route(request: Request) -> AutoRoute:
    return server_state(request).route


def _describe(active: ActiveRouter) -> dict[str, Any]:
    """The router in use, for people."""
    config = active.router.config
    shadow = active.settings.shadow
    return {
        "object": "router",
        "path": str(active.settings.path),
        "shadow": str(shadow) if shadow else None,
        "features": config.features,
        "labels": config.labels,
        "experts": config.experts,
        "thresholds": active.router.thresholds(),
        "heldout": config.heldout.model_dump(),
        "drift": active.drift.figures(),
    }


@routing_router.post("/route")
async def decide(body: RouteBody, request: Request) -> JSONResponse:
    """The decision that `model="auto"` would take, without generating."""
    route = _route(request)
    asked = body.model_dump(exclude_none=True, exclude={"explain"})
    decision, seconds = await route.decide_aside(asked, counted=False)
    content: dict[str, Any] = decision.to_json() | {
        "probabilities": decision.probabilities,
        "seconds": seconds,
        "error": route.error,
    }
    if body.explain:
        content["explanation"] = await run_in_threadpool(route.explain, asked)
    return JSONResponse(content)


@routing_router.get("/router")
async def show(request: Request) -> JSONResponse:
    """The router in use, and how its decisions compare with its fit."""
    active = _route(request).active
    if active is None:
        return _refusal(str(_route(request).error), HTTPStatus.NOT_FOUND, "NotFoundError")
    return JSONResponse(_describe(active))


@routing_router.post("/router/reload")
async def reload(request: Request, body: ReloadBody | None = None) -> JSONResponse:
    """Load a router and let it decide from now on."""
    body = body or ReloadBody()
    try:
        # Reading the files must not hold up the event loop.
        fresh = await run_in_threadpool(_route(request).reload, body.path, body.shadow)
    except (ValueError, OSError) as error:
        return _refusal(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
    return JSONResponse(_describe(fresh))


def _refusal(message: str, status: HTTPStatus, kind: str) -> JSONResponse:
    body = error_response(message, status, kind)
    return JSONResponse(body.model_dump(), status_code=status.value)
