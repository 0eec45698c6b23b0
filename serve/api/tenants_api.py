"""`POST /v1/tenants/reload`: read `tenants.yaml` again; a bad one leaves the old one in place."""

from http import HTTPStatus

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from deltamux.serve.api.experts_api import failure
from deltamux.serve.api.state import server_state

tenants_router = APIRouter(prefix="/v1")


@tenants_router.post("/tenants/reload")
async def reload_tenants(request: Request) -> JSONResponse:
    """Let the keys and limits of the file count from now on; the minutes begin anew."""
    server = server_state(request)
    if server.settings.tenants is None:
        return failure("no tenants are configured", HTTPStatus.BAD_REQUEST)
    try:
        server.doors.reload()
    except (ValueError, OSError) as error:
        return failure(str(error), HTTPStatus.BAD_REQUEST)
    names = sorted(tenant.name for tenant in server.doors.keys.tenants)
    return JSONResponse({"object": "list", "data": names})
