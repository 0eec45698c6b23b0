"""What a client asks of the fleet: the model, and for `auto` the expert, which is decided once for all replicas."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.exceptions import HTTPException
from starlette.requests import Request

from deltamux.serve.api.guard import MOST_BODY_BYTES
from deltamux.serve.names import AUTO, BASE

# What the router reads, of any of the APIs; token ids are a prompt to it.
_READ = ("prompt", "messages", "input", "previous_response_id", "metadata")
# Headers of one connection, and those that are made anew.
_NOT_PASSED = frozenset(
    (
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
        *("host", "content-length", "date", "server"),
    )
)


@dataclass
class Asked:
    """A request on its way to a replica.

    Attributes:
        method: HTTP's.
        path: With the query.
        headers: Those that are passed on.
        body: As bytes.
        content: The body as JSON; empty where it is something else.
        said: Headers of the response that say how `auto` was decided.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    content: dict[str, Any] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """Who is asked; None: the body names nobody."""
        model = self.content.get("model")
        return model if isinstance(model, str) else None


def passed(headers: Any) -> list[tuple[str, str]]:
    """The headers that go on to the other side."""
    return [(name, value) for name, value in headers if name.lower() not in _NOT_PASSED]


async def read(request: Request) -> Asked:
    """Read a client's request.

    Raises:
        HTTPException: It is larger than what any server takes.
    """
    path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY_BYTES:
            raise HTTPException(413, f"a body has up to {MOST_BODY_BYTES:,} bytes")
    headers = passed(request.headers.items())
    return Asked(request.method, path, headers, bytes(body), _as_json(body))


def _as_json(body: bytearray) -> dict[str, Any]:
    try:
        content = json.loads(body) if body else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


async def decide(asked: Asked, client: httpx.AsyncClient, url: str) -> None:
    """Have a replica's router decide on `auto`; where it cannot, the replica that answers does, or says why not.

    Args:
        asked: The request; it names the expert from here on.
        client: The front's.
        url: The replica.

    Raises:
        httpx.TransportError: The replica does not answer.
    """
    content = asked.content
    question = {name: content[name] for name in _READ if content.get(name) is not None}
    if "token_ids" in content:
        question["prompt"] = content["token_ids"]
    headers = [pair for pair in asked.headers if pair[0].lower() == "authorization"]
    answer = await client.post(f"{url}/v1/route", json=question, headers=headers)
    if answer.status_code != httpx.codes.OK or "reason" not in answer.json():
        return
    decision = answer.json()
    asked.content = content | {"model": decision["expert"] or BASE}
    asked.body = json.dumps(asked.content).encode()
    asked.said = {
        "x-deltamux-domain": str(decision["domain"]),
        "x-deltamux-confidence": f"{decision['confidence']:.4f}",
        "x-deltamux-reason": str(decision["reason"]),
    }


def wants_decision(asked: Asked) -> bool:
    """Whether the router has to decide."""
    return asked.model == AUTO
