"""HTTP routes of the experts: list, register, update, delete, pin, bring into a slot."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from deltamux.serve.api.expert import Expert, ExpertError
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.handlers import error_response
from deltamux.serve.api.state import ServerState, server_state
from deltamux.serve.names import RESERVED_NAMES
from deltamux.serve.settings import ExpertName

experts_router = APIRouter(prefix="/v1")


class RegisterBody(BaseModel):
    """`POST /v1/experts`."""

    model_config = ConfigDict(extra="forbid")

    name: ExpertName
    path: Path
    pin: bool = False


def _describe(expert: Expert, server: ServerState) -> dict[str, Any]:
    waiting, running = server.journal.in_flight().get(expert.name, (0, 0))
    seen = server.registry.status_of(expert)
    return {
        "id": expert.name,
        "object": "expert",
        "path": str(expert.path),
        "content": expert.content or None,
        "tier": seen.tier,
        "slot": seen.slot,
        "pinned": seen.pinned,
        "bytes": expert.num_bytes,
        "bits_per_weight": expert.bits_per_weight,
        "slot_bits_per_weight": expert.slot_bits_per_weight,
        "last_used": expert.last_used,
        "running": running,
        "waiting": waiting,
        "error": expert.error or seen.error,
    }


def _failure(message: str, status: HTTPStatus) -> JSONResponse:
    kind = "NotFoundError" if status is HTTPStatus.NOT_FOUND else "BadRequestError"
    body = error_response(message, status, kind)
    return JSONResponse(body.model_dump(), status_code=status.value)


def _missing(name: str) -> JSONResponse:
    return _failure(f"The expert `{name}` does not exist.", HTTPStatus.NOT_FOUND)


@experts_router.get("/experts")
async def list_experts(request: Request) -> JSONResponse:
    """All experts with their residency."""
    server = server_state(request)
    data = [_describe(expert, server) for expert in server.registry]
    return JSONResponse({"object": "list", "data": data, "slots": server.slots})


@experts_router.post("/experts")
async def register_expert(body: RegisterBody, request: Request) -> JSONResponse:
    """Load an expert, or a new version of one."""
    if body.name in RESERVED_NAMES:
        return _failure(f"an expert cannot be called {body.name!r}", HTTPStatus.BAD_REQUEST)
    server = server_state(request)
    try:
        expert = await server.registry.register(body.name, body.path, body.pin)
    except ExpertError as error:
        return _failure(str(error), HTTPStatus.BAD_REQUEST)
    return JSONResponse(_describe(expert, server), status_code=HTTPStatus.CREATED.value)


@experts_router.get("/experts/{name}")
async def get_expert(name: str, request: Request) -> JSONResponse:
    """One expert."""
    server = server_state(request)
    expert = server.registry.get(name)
    return JSONResponse(_describe(expert, server)) if expert else _missing(name)


@experts_router.delete("/experts/{name}")
async def delete_expert(name: str, request: Request) -> JSONResponse:
    """Stop offering an expert; answers once its running requests have ended."""
    registry = server_state(request).registry
    if registry.get(name) is None:
        return _missing(name)
    await registry.delete(name)
    return JSONResponse({"id": name, "object": "expert", "deleted": True})


@experts_router.post("/experts/{name}/pin")
async def pin_expert(name: str, request: Request) -> JSONResponse:
    """Keep an expert in a slot."""
    return await _moved(name, server_state(request), ExpertRegistry.pin)


@experts_router.delete("/experts/{name}/pin")
async def unpin_expert(name: str, request: Request) -> JSONResponse:
    """Let an expert leave its slot when another needs it."""
    return await _moved(name, server_state(request), ExpertRegistry.unpin)


@experts_router.post("/experts/{name}/slot")
async def activate_expert(name: str, request: Request) -> JSONResponse:
    """Bring an expert into a slot now; without a pin it leaves again when others need the slot."""
    return await _moved(name, server_state(request), ExpertRegistry.activate)


async def _moved(
    name: str, server: ServerState, move: Callable[[ExpertRegistry, str], Awaitable[None]]
) -> JSONResponse:
    """Move an expert, and describe it then."""
    expert = server.registry.get(name)
    if expert is None:
        return _missing(name)
    try:
        await move(server.registry, name)
    except ExpertError as error:
        return _failure(str(error), HTTPStatus.BAD_REQUEST)
    return JSONResponse(_describe(expert, server))
