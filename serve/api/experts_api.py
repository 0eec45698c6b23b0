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
from deltamux.serve.api.refusals import error_response
from deltamux.serve.api.state import ServerState, server_state
from deltamux.serve.api.tenants import current_tenant
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
        "path": str(expert.path) if sees_paths() else None,
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
        "error": _told(expert.error or seen.error),
    }


def sees_paths() -> bool:
    """Whether the client may know how the server's disk is laid out: an admin, or anybody where there are no tenants."""
    tenant = current_tenant.get()
    return tenant is None or tenant.admin


def _told(reason: str | None) -> str | None:
    """Why an expert is refused; its paths are for those who may know them."""
    return reason if reason is None or sees_paths() else "refused"


def _visible(name: str, server: ServerState) -> Expert | None:
    """An expert, as far as the client may know of it."""
    tenant = current_tenant.get()
    return server.registry.get(name) if tenant is None or tenant.may_use(name) else None


def failure(message: str, status: HTTPStatus) -> JSONResponse:
    """An error in the OpenAI body."""
    kind = "NotFoundError" if status is HTTPStatus.NOT_FOUND else "BadRequestError"
    body = error_response(message, status, kind)
    return JSONResponse(body.model_dump(), status_code=status.value)


def _missing(name: str) -> JSONResponse:
    return failure(f"The expert `{name}` does not exist.", HTTPStatus.NOT_FOUND)


@experts_router.get("/experts")
async def list_experts(request: Request) -> JSONResponse:
    """All experts with their residency."""
    server = server_state(request)
    data = [_describe(each, server) for each in server.registry if _visible(each.name, server)]
    return JSONResponse({"object": "list", "data": data, "slots": server.registry.slots})


@experts_router.post("/experts")
async def register_expert(body: RegisterBody, request: Request) -> JSONResponse:
    """Load an expert, or a new version of one."""
    if body.name in RESERVED_NAMES:
        return failure(f"an expert cannot be called {body.name!r}", HTTPStatus.BAD_REQUEST)
    server = server_state(request)
    try:
        path = server.roots.inside(body.path)
        expert = await server.registry.register(body.name, path, body.pin)
    except (ExpertError, ValueError) as error:
        return failure(str(error), HTTPStatus.BAD_REQUEST)
    server.saved.write(server.registry)
    return JSONResponse(_describe(expert, server), status_code=HTTPStatus.CREATED.value)


@experts_router.get("/experts/{name}")
async def get_expert(name: str, request: Request) -> JSONResponse:
    """One expert."""
    server = server_state(request)
    expert = _visible(name, server)
    return JSONResponse(_describe(expert, server)) if expert else _missing(name)


@experts_router.delete("/experts/{name}")
async def delete_expert(name: str, request: Request) -> JSONResponse:
    """Stop offering an expert; answers once its running requests have ended."""
    server = server_state(request)
    if server.registry.get(name) is None:
        return _missing(name)
    await server.registry.delete(name)
    server.saved.write(server.registry)
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
        return failure(str(error), HTTPStatus.BAD_REQUEST)
    server.saved.write(server.registry)
    return JSONResponse(_describe(expert, server))
