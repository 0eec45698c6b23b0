"""The response headers that say who answered, and why."""

import time
from typing import Any

from deltamux.router.decide.decision import Decision
from deltamux.serve.api.handlers import ARRIVAL
from deltamux.serve.names import BASE

HEADER_PREFIX = b"x-deltamux-"
# What a browser shows to a page of another origin; without CORS it shows nothing at all.
EXPOSED = (
    b"access-control-expose-headers",
    b"x-deltamux-expert, x-deltamux-domain, x-deltamux-confidence, x-deltamux-reason, x-request-id, "
    b"retry-after",
)


class DecisionHeaders:
    """ASGI middleware: when a request came in; who answered, and why, as response headers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Note the arrival; add headers to responses of requests that were decided on."""
        scope.setdefault("state", {})[ARRIVAL] = time.time()

        async def send_with_headers(message: Any) -> None:
            decision = scope.get("state", {}).get("deltamux")
            if message["type"] == "http.response.start":
                added = _headers(decision) if decision is not None else []
                if _has_origin(scope):
                    added = [*added, EXPOSED]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _has_origin(scope: Any) -> bool:
    """Whether a page of some origin asks, by a browser."""
    return any(name == b"origin" for name, _ in scope.get("headers", []))


def _headers(decision: Decision) -> list[tuple[bytes, bytes]]:
    fields = {
        "expert": decision.expert or BASE,
        "domain": decision.domain,
        "confidence": f"{decision.confidence:.4f}",
        "reason": decision.reason,
    }
    return [(HEADER_PREFIX + key.encode(), _header_value(value)) for key, value in fields.items()]


def _header_value(text: str) -> bytes:
    """Visible ASCII; a domain's name comes from training data and may hold anything."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).encode()
