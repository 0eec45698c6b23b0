"""The fleet's one endpoint: an ASGI application in front of all replicas.

What generates goes to one replica (`forward.py`); what changes something goes to all (`changes.py`); what is looked at comes from
all (`pages.py`). Keys are the replicas' affair: they get a client's key as it is, and their refusals are passed on.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import httpx
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from deltamux.serve.api.access import Access, access_of
from deltamux.serve.fleet.asked import passed
from deltamux.serve.fleet.changes import Changes
from deltamux.serve.fleet.forward import Forwarder, failure, healthy
from deltamux.serve.fleet.pages import OwnMetrics, all_experts, labelled, one_expert
from deltamux.serve.fleet.roster import RosterClient
from deltamux.serve.fleet.settings import FleetSettings
from deltamux.serve.fleet.table import Replica, Table

logger = logging.getLogger("deltamux")

LOOK_SECONDS = 0.5
# A busy machine answers late, and its requests are not lost by that.
MOST_LATE = 3
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
Page = Callable[[dict[str, httpx.Response]], Response]


class Front:
    """The endpoint.

    Args:
        settings: The fleet's.
        roster: Who is there.
        key: The servers' own key, by which the front looks at them; None: they have none.
        transport: How replicas are reached; None: by HTTP.
    """

    def __init__(
        self,
        settings: FleetSettings,
        roster: RosterClient,
        key: str | None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._roster = roster
        self.table = Table(settings.placement, settings.bound, settings.room)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        timeout = httpx.Timeout(None, connect=5.0)
        self._client = httpx.AsyncClient(
            limits=limits, timeout=timeout, trust_env=False, transport=transport
        )
        self._forward = Forwarder(self.table, self._client, settings.patience)
        self._changes = Changes(self.table, self._client, roster, key)
        self.app = Starlette(
            routes=[Route("/{path:path}", self._answer, methods=METHODS)], lifespan=self._lifespan
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        watch = asyncio.ensure_future(self._watch())
        yield
        watch.cancel()
        await self._client.aclose()

    async def _watch(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("deltamux: the fleet could not be looked at")
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """See who is there, and bring whoever is new to the state of the others."""
        known = await self._roster.known()
        self.table.update(known.seats)
        await asyncio.gather(*(self._look_at(each) for each in self.table.all))

    async def _look_at(self, replica: Replica) -> None:
        try:
            alive = await healthy(self._client, replica.url)
            replica.late = 0
        except httpx.TimeoutException:
            replica.late += 1
            alive = replica.late < MOST_LATE
        if not alive:
            if replica.ready:
                self.table.lose(replica)
            return
        replica.experts = await self._changes.names(replica)
        if not replica.ready and await self._changes.catch_up(replica):
            replica.gone.clear()
            replica.ready = True
            logger.info("deltamux: %s answers at %s", replica.name, replica.url)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        access = access_of(method, path)
        looked_at = {"/metrics": self._metrics, "/v1/experts": self._experts}
        if path in ("/health", "/v1/ready"):
            return self._ready()
        if method == "GET" and path in looked_at:
            return await self._of_all(request, looked_at[path])
        if method == "GET" and access is Access.USER and _is_expert(path):
            return await self._of_all(request, self._expert)
        if access is Access.ADMIN and method != "GET" and not path.endswith("/slot"):
            return await self._changes.everywhere(request)
        return await self._forward.answer(request)

    def _ready(self) -> Response:
        replicas = {each.name: each.ready for each in self.table.all}
        ready = any(replicas.values())
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"ready": ready, "replicas": replicas}, status.value)

    async def _of_all(self, request: Request, page: Page) -> Response:
        """Ask all replicas the same, and make one page of it; a refusal is passed on."""
        headers = passed(request.headers.items())

        async def ask(replica: Replica) -> tuple[str, httpx.Response | None]:
            try:
                url = replica.url + request.url.path
                return replica.name, await self._client.get(url, headers=headers, timeout=30)
            except httpx.TransportError:
                return replica.name, None

        tasks: list[Awaitable[tuple[str, httpx.Response | None]]] = list(map(ask, self.table.ready))
        told = {name: said for name, said in await asyncio.gather(*tasks) if said is not None}
        fine = {name: said for name, said in told.items() if said.status_code == httpx.codes.OK}
        if fine:
            return page(fine)
        for said in told.values():
            return Response(said.content, said.status_code, media_type="application/json")
        return failure("no replica can answer now", HTTPStatus.SERVICE_UNAVAILABLE)

    def _metrics(self, told: dict[str, httpx.Response]) -> Response:
        counts = dict(self._forward.counts) | {"spilled": self.table.spilled}
        asked = {each.name: each.asked for each in self.table.all}
        own = generate_latest(OwnMetrics(counts, asked, [e.name for e in self.table.ready]))
        pages = labelled({name: said.text for name, said in told.items()})
        return PlainTextResponse(pages + own.decode())

    def _experts(self, told: dict[str, httpx.Response]) -> Response:
        return JSONResponse(all_experts(_json(told)))

    def _expert(self, told: dict[str, httpx.Response]) -> Response:
        return JSONResponse(one_expert(_json(told)))


def _json(told: dict[str, httpx.Response]) -> dict[str, Any]:
    return {name: said.json() for name, said in told.items()}


def _is_expert(path: str) -> bool:
    return path.startswith("/v1/experts/")
