"""HTTP routes of the router: the decision alone, its reasons, feedback, reload, drift.

`POST /v1/router/reload` validates before it swaps: a bad artifact leaves the old router in place and
gives an error in the OpenAI body.
"""

import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from deltamux.serve.api.active_router import ActiveRouter
from deltamux.serve.api.asked import RequestError, bare_id
from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.refusals import error_response
from deltamux.serve.api.state import server_state
from deltamux.serve.api.tenants import current_tenant

routing_router = APIRouter(prefix="/v1")


class RouteBody(BaseModel):
    """`POST /v1/route`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[int] | list[str] | list[list[int]] | None = None
    messages: list[Any] | None = None
    input: str | list[Any] | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None
    explain: bool = False


class FeedbackBody(BaseModel):
    """`POST /v1/route/feedback`: the id of a response, and who should have answered it."""

    model_config = ConfigDict(extra="forbid")

    id: str
    expert: str


class ReloadBody(BaseModel):
    """`POST /v1/router/reload`; without a path the directory in use is read again."""

    model_config = ConfigDict(extra="forbid")

    path: Path | None = None
    shadow: Path | None = None


def _route(request: Request) -> AutoRoute:
    return server_state(request).route


def _describe(active: ActiveRouter, route: AutoRoute) -> dict[str, Any]:
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
        "not_served": route.not_served(),
        "thresholds": active.router.thresholds(),
        "heldout": config.heldout.model_dump(),
        "drift": active.drift.figures(),
    }


@routing_router.post("/route")
async def decide(body: RouteBody, request: Request) -> JSONResponse:
    """The decision that `model="auto"` would take, without generating; of several prompts, each."""
    route = _route(request)
    asked = body.model_dump(exclude_none=True, exclude={"explain"})
    tenant, server = current_tenant.get(), server_state(request)
    if body.previous_response_id and not server.owners.may_read(body.previous_response_id, tenant):
        message = f"Response with id '{body.previous_response_id}' not found."
        return _refusal(message, HTTPStatus.NOT_FOUND, "NotFoundError")
    allowed = tenant.experts if tenant else None
    start = time.perf_counter()
    try:
        decisions = await run_in_threadpool(route.decide_each, asked, False, allowed)
    except RequestError as error:
        return _refusal(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
    shown = [
        made.to_json() | {"probabilities": route.visible(made.probabilities, allowed)}
        for made in decisions
    ]
    content: dict[str, Any] = shown[0] if len(shown) == 1 else {"decisions": shown}
    content |= {"seconds": time.perf_counter() - start, "error": route.error}
    # An explanation names every domain of the router.
    if body.explain and allowed is None:
        content["explanation"] = await run_in_threadpool(route.explain, asked)
    return JSONResponse(content)


@routing_router.post("/route/feedback")
async def feedback(body: FeedbackBody, request: Request) -> JSONResponse:
    """Note who should have answered; `deltamux router refit` learns from it."""
    route = _route(request)
    if route.log is None:
        message = "no decisions are logged; set router.log in the configuration"
        return _refusal(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
    known = set(route.experts())
    if body.expert not in known:
        message = f"the router knows no expert {body.expert!r}; it knows {sorted(known)}"
        return _refusal(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
    if not await run_in_threadpool(route.log.feedback, bare_id(body.id), body.expert):
        message = f"no routed response {body.id!r} is known"
        return _refusal(message, HTTPStatus.NOT_FOUND, "NotFoundError")
    return JSONResponse({"id": body.id, "expert": body.expert})


@routing_router.get("/router")
async def show(request: Request) -> JSONResponse:
    """The router in use, and how its decisions compare with its fit."""
    active = _route(request).active
    if active is None:
        return _refusal(str(_route(request).error), HTTPStatus.NOT_FOUND, "NotFoundError")
    return JSONResponse(_describe(active, _route(request)))


@routing_router.post("/router/reload")
async def reload(request: Request, body: ReloadBody | None = None) -> JSONResponse:
    """Load a router and let it decide from now on."""
    body = body or ReloadBody()
    try:
        roots = server_state(request).roots
        path, shadow = (each and roots.inside(each) for each in (body.path, body.shadow))
        # Reading the files must not hold up the event loop.
        fresh = await run_in_threadpool(_route(request).reload, path, shadow)
    except (ValueError, OSError) as error:
        return _refusal(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
    return JSONResponse(_describe(fresh, _route(request)))


def _refusal(message: str, status: HTTPStatus, kind: str) -> JSONResponse:
    body = error_response(message, status, kind)
    return JSONResponse(body.model_dump(), status_code=status.value)
