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

from deltamux.serve.settings import PluginSettings
from deltamux.serve.status import read_status

router = APIRouter(prefix="/v1")


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 with `ready` true, or 503 with the reasons."""
    reasons = await not_ready(request.app.state)
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=status.value)


async def not_ready(state: Any) -> list[str]:
    """What is missing, one sentence each; empty when the server is ready."""
    reasons = []
    try:
        await state.engine_client.check_health()
    except Exception as error:
        reasons.append(f"the engine is not alive: {str(error) or type(error).__name__}")
    settings: PluginSettings = state.deltamux_settings
    if settings.router is not None and state.deltamux_route.error is not None:
        reasons.append(f"the router is not loaded: {state.deltamux_route.error}")
    wanted = {expert.name for expert in settings.experts if expert.pin}
    wanted |= {expert.name for expert in state.deltamux_registry if expert.pinned}
    status = read_status()
    for name in sorted(wanted):
        expert = state.deltamux_registry.get(name)
        if expert is None:
            continue  # deleted since
        seen = expert.request and status.experts.get(expert.request.lora_int_id)
        if seen is None or seen.tier != "slot":
            tier = seen.tier if seen else "disk"
            reasons.append(f"the pinned expert {name!r} is not in a slot: {expert.error or tier}")
    return reasons
