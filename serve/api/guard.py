"""The keys: who gets in, how often, and what is said to those who do not.

It stands in the place of vLLM's own check of `--api-key`, which knows neither tenants nor the routes outside of `/v1`, and
inside vLLM's CORS headers, so that a browser may read why it was turned away.
"""

import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers

from deltamux.compression.files import MIB
from deltamux.serve.api.access import Access, access_of
from deltamux.serve.api.tenants import Keys, Tenant, current_tenant, load_tenants
from deltamux.serve.observability import metrics

logger = logging.getLogger("vllm.deltamux")

# Of a request's body, which is parsed as a whole. Chosen, not measured: the longest contexts take some megabytes.
MOST_BODY_BYTES = 64 * MIB
POLICY_VIOLATION = 1008  # of a WebSocket
WEBSOCKET = "websocket"


class Doors:
    """The keys that open a server; the middleware and the routes share them.

    Args:
        tenants: `tenants.yaml`; None: vLLM's own keys alone.
        api_keys: vLLM's own.
        open_metrics: Whether `/metrics` asks for no key.

    Raises:
        ValueError: The file is wrong.
    """

    def __init__(
        self, tenants: Path | None = None, api_keys: Sequence[str] = (), open_metrics: bool = True
    ) -> None:
        self._tenants, self._api_keys = tenants, tuple(api_keys)
        self.open_metrics = open_metrics
        self.reload()

    def reload(self) -> None:
        """Read the tenants again; the old ones stay where that fails.

        Raises:
            ValueError: The file is wrong.
        """
        tenants = load_tenants(self._tenants) if self._tenants else []
        self.keys = Keys(tenants, self._api_keys)

    def needs_key(self, access: Access) -> bool:
        """Whether a route asks for a key."""
        if access is Access.OPEN or (access is Access.METRICS and self.open_metrics):
            return False
        return self.keys.required


class Guard:
    """ASGI middleware: keys, tenants' rights and limits."""

    def __init__(self, app: Any, doors: Doors) -> None:
        self._app, self._doors = app, doors

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request in, or answer it."""
        if scope["type"] not in ("http", WEBSOCKET):
            await self._app(scope, receive, send)
            return
        method = scope.get("method", "GET")
        access = access_of(method, get_route_path(scope))
        tenant = self._doors.keys.owner(Headers(scope=scope).get("authorization"))
        refused = self._refusal(access, tenant) or _too_large(scope)
        if refused:
            await _refuse(scope, send, *refused)
            return
        receive = _bounded(receive)
        mark = current_tenant.set(tenant)
        try:
            if tenant is None or method != "POST" or access is not Access.USER:
                await self._app(scope, receive, send)
            else:
                await self._limited(tenant, scope, receive, send)
        finally:
            current_tenant.reset(mark)

    def _refusal(self, access: Access, tenant: Tenant | None) -> tuple[HTTPStatus, str] | None:
        if access is Access.GONE:
            return HTTPStatus.FORBIDDEN, "experts are loaded with POST /v1/experts"
        if not self._doors.needs_key(access):
            return None
        if tenant is None:
            return HTTPStatus.UNAUTHORIZED, "give a valid key: Authorization: Bearer KEY"
        if access is Access.ADMIN and not tenant.admin:
            metrics.tenant_refusals.labels(tenant.name, "admin").inc()
            return HTTPStatus.FORBIDDEN, f"the tenant {tenant.name!r} is no admin"
        return None

    async def _limited(self, tenant: Tenant, scope: Any, receive: Any, send: Any) -> None:
        lacking = tenant.limits.enter()
        if lacking:
            what, seconds = lacking
            metrics.tenant_refusals.labels(tenant.name, what).inc()
            words = f"the tenant {tenant.name!r} has reached its limit of {_LIMITS[what]}"
            headers = [(b"retry-after", str(seconds).encode())]
            await _refuse(scope, send, HTTPStatus.TOO_MANY_REQUESTS, words, headers)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            tenant.limits.leave()


def _bounded(receive: Any) -> Any:
    """What receives a body, and ends the connection where it is larger than anything that is asked."""
    received = 0

    async def bounded() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MOST_BODY_BYTES:
            logger.warning("deltamux: a request's body has more than %d bytes", MOST_BODY_BYTES)
            return {"type": "http.disconnect"}
        return message

    return bounded


_LIMITS = {
    "requests": "requests a minute",
    "tokens": "tokens a minute",
    "concurrency": "requests at one time",
}
_KINDS = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "BadRequestError",
}


def _too_large(scope: Any) -> tuple[HTTPStatus, str] | None:
    """Refuse a body by the size that it says it has."""
    said = Headers(scope=scope).get("content-length", "0")
    digits = len(str(MOST_BODY_BYTES))
    if not said.isdecimal() or (len(said) <= digits and int(said) <= MOST_BODY_BYTES):
        return None
    return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has up to {MOST_BODY_BYTES:,} bytes"


async def _refuse(
    scope: Any,
    send: Any,
    status: HTTPStatus,
    message: str,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Answer with an error in the OpenAI body, or close a WebSocket."""
    if scope["type"] == WEBSOCKET:
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": message})
        return
    error = {"message": message, "type": _KINDS[status], "param": None, "code": status.value}
    body = json.dumps({"error": error}).encode()
    found = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    if status is HTTPStatus.UNAUTHORIZED:
        found.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status.value, "headers": found})
    await send({"type": "http.response.body", "body": body})
