"""`POST /invocations`, by which SageMaker asks: the same as chat completions or completions.

vLLM's own route takes the model from a header alone and drops the one in the body. Here a request goes on as the one
that it is, with its model: that of the header, or else that of the body.
"""

import json
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

PATH = "/invocations"
MODEL_HEADER = "x-amzn-sagemaker-adapter-identifier"
# Which API a body is of, by what it holds.
TARGETS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


class Invocations:
    """ASGI middleware that sends the route's requests to the API that they are of."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or get_route_path(scope) != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        content = _object(await _body(receive))
        target = next((TARGETS[key] for key in TARGETS if key in content), None)
        if target is None:
            words = "the body must be a JSON object with 'messages' or 'prompt'"
            error = {"message": words, "type": "BadRequestError", "param": None, "code": 400}
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return
        model = Headers(scope=scope).get(MODEL_HEADER)
        body = json.dumps(content | ({"model": model} if model else {})).encode()
        root = scope.get("root_path", "")
        inner = scope | {
            "path": root + target,
            "raw_path": (root + target).encode(),
            "headers": _with_length(scope["headers"], len(body)),
        }
        await self._app(inner, _replayed(body, receive), send)


async def _body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


def _object(body: bytes) -> dict[str, Any]:
    """The body's object; empty where it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    dropped = (b"content-length", b"content-type", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [
        *kept,
        (b"content-length", str(length).encode()),
        (b"content-type", b"application/json"),
    ]


def _replayed(body: bytes, receive: Any) -> Any:
    """What receives the body that was read, then what else comes: that the client has left."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return pending.pop() if pending else await receive()

    return replay
