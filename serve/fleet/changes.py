"""What changes a server, on all of them: those that are there, and those that start later.

A change goes to every replica that is ready. Where one refuses it, the client is told, and nothing is kept for later. What must
also hold on replicas that start later (experts, pins, the router) is kept in the roster; a replica answers no request before it
has seen all of that.
"""

import asyncio
import json
import logging
import re
from http import HTTPStatus
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltamux.serve.fleet.asked import Asked, read
from deltamux.serve.fleet.forward import failure
from deltamux.serve.fleet.roster import Change, RosterClient
from deltamux.serve.fleet.table import Replica, Table

logger = logging.getLogger("deltamux")

_PIN = re.compile(r"/v1/experts/([^/]+)/pin")
_EXPERT = re.compile(r"/v1/experts/([^/]+)")


def kept(asked: Asked) -> Change | None:
    """What a request changes for replicas that start later, too; None: nothing."""
    path, content = asked.path.partition("?")[0], asked.content
    key = None
    if path == "/v1/experts" and isinstance(content.get("name"), str):
        key = f"expert:{content['name']}"
    elif found := _PIN.fullmatch(path):
        key = f"pin:{found[1]}"
    elif found := _EXPERT.fullmatch(path):
        key = f"expert:{found[1]}"
    elif path == "/v1/router/reload":
        key = "router"
    return None if key is None else Change(key, asked.method, path, content or None)


class Changes:
    """Carries changes to replicas.

    Args:
        table: The replicas.
        client: For all connections to them.
        roster: Where changes are kept.
        key: The servers' own key; None: they have none.
    """

    def __init__(
        self, table: Table, client: httpx.AsyncClient, roster: RosterClient, key: str | None
    ) -> None:
        self._table, self._client, self._roster = table, client, roster
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        # A replica that catches up must not miss the change that is under way.
        self._lock = asyncio.Lock()

    async def everywhere(self, request: Request) -> Response:
        """Carry a client's change to all replicas."""
        asked = await read(request)
        async with self._lock:
            replicas = self._table.ready
            if not replicas:
                return failure("no replica can answer now", HTTPStatus.SERVICE_UNAVAILABLE)
            told = await asyncio.gather(*(self._carry(each, asked) for each in replicas))
            said = {r.name: each for r, each in zip(replicas, told, strict=True) if each}
            refused = {name: each for name, each in said.items() if each.is_error}
            change = kept(asked)
            if change is not None and not refused and said:
                await self._roster.note(change)
                for replica in replicas:
                    replica.applied[change.key] = change
        return _as_one(said, refused)

    async def _carry(self, replica: Replica, asked: Asked) -> httpx.Response | None:
        """Ask one replica; one that does not answer catches up when it is back."""
        try:
            return await self._client.request(
                asked.method, replica.url + asked.path, headers=asked.headers, content=asked.body
            )
        except httpx.TransportError:
            self._table.lose(replica)
            return None

    async def catch_up(self, replica: Replica) -> bool:
        """Carry all that was changed before to a replica; whether it may answer now."""
        async with self._lock:
            for change in (await self._roster.known()).changes:
                if replica.applied.get(change.key) == change:
                    continue
                try:
                    said = await self._client.request(
                        change.method,
                        replica.url + change.path,
                        json=change.body,
                        headers=self._headers,
                    )
                except httpx.TransportError:
                    return False
                gone = change.method == "DELETE" and said.status_code == HTTPStatus.NOT_FOUND
                if said.is_error and not gone:
                    logger.error(
                        "deltamux: %s refuses %s: %s", replica.name, change.key, said.text[:300]
                    )
                replica.applied[change.key] = change
        return True

    async def names(self, replica: Replica) -> frozenset[str] | None:
        """The experts that a replica serves; None: it does not tell the front."""
        try:
            said = await self._client.get(
                f"{replica.url}/v1/experts", headers=self._headers, timeout=10
            )
        except httpx.TransportError:
            return replica.experts
        if said.is_error:
            return None
        return frozenset(expert["id"] for expert in said.json()["data"])


def _as_one(said: dict[str, httpx.Response], refused: dict[str, httpx.Response]) -> Response:
    """One replica's answer, with what each said; a refusal where there is one."""
    if not said:
        return failure("no replica answered", HTTPStatus.SERVICE_UNAVAILABLE)
    first = next(iter((refused or said).values()))
    try:
        content: Any = json.loads(first.content)
    except ValueError:
        return Response(first.content, first.status_code)
    if isinstance(content, dict):
        content["replicas"] = {name: each.status_code for name, each in said.items()}
    return JSONResponse(content, first.status_code)
