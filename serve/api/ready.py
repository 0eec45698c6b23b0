"""`GET /v1/ready`: whether the server can do all that it was configured for.

`/health` is vLLM's own and says that the engine is alive. Ready means more: the base answers, the
router (if one is configured) is loaded, and every pinned expert is in a slot. A configured expert that
was refused makes only its own requests fail, so it does not make the server unready; `/v1/experts` and
the log have its reason.
"""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from deltamux.serve.api.state import ServerState, server_state
from deltamux.serve.api.tenants import current_tenant

ready_router = APIRouter(prefix="/v1")


@ready_router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 with `ready` true, or 503; with the reasons for those who may know them."""
    reasons = await not_ready(server_state(request))
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    content: dict[str, Any] = {"ready": not reasons}
    if _may_know(server_state(request)):
        content["reasons"] = reasons
    return JSONResponse(content, status_code=status.value)


def _may_know(server: ServerState) -> bool:
    """Whether the client is told the reasons, which name experts and paths: an admin, or anybody where no key is set."""
    tenant = current_tenant.get()
    return tenant.admin if tenant else not server.doors.keys.required


async def not_ready(server: ServerState) -> list[str]:
    """What is missing, one sentence each; empty when the server is ready."""
    reasons = []
    try:
        await server.engine.check_health()
    except Exception as error:
        reasons.append(f"the engine is not alive: {str(error) or type(error).__name__}")
    if server.settings.router is not None and server.route.error is not None:
        reasons.append(f"the router is not loaded: {server.route.error}")
    wanted = {expert.name for expert in server.settings.experts if expert.pin}
    wanted |= {expert.name for expert in server.registry if expert.pinned}
    for name in sorted(wanted):
        expert = server.registry.get(name)
        if expert is None:
            continue  # deleted since
        tier = server.registry.status_of(expert).tier
        if tier != "slot":
            reasons.append(f"the pinned expert {name!r} is not in a slot: {expert.error or tier}")
    return reasons
