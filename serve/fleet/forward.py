"""The way of a request through the fleet: decide, choose a replica, pass on; where that fails, choose another.

A request is sent again only while nothing of an answer has reached the client: a stream begins with its first bytes, any other
answer when all of it is there. A request that three replicas failed on is not sent to a fourth: it may be what ends them.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from deltamux.serve.fleet.asked import Asked, decide, passed, read, wants_decision
from deltamux.serve.fleet.table import Replica, Table

MOST_TRIES = 3
# How often a request that nobody can take looks again.
LOOK_SECONDS = 0.1


class ReplicaError(Exception):
    """A replica did not answer; whether it got the request is in `sent`."""

    def __init__(self, sent: bool) -> None:
        super().__init__()
        self.sent = sent


class Forwarder:
    """Sends requests to replicas.

    Args:
        table: The replicas.
        client: For all connections to them.
        patience: Seconds that a request waits for a replica.
    """

    def __init__(self, table: Table, client: httpx.AsyncClient, patience: float) -> None:
        self._table, self._client, self._patience = table, client, patience
        self.counts: Counter[str] = Counter()

    async def answer(self, request: Request) -> Response:
        """Answer a request."""
        asked = await read(request)
        tried: list[Replica] = []
        last: Response | None = None
        end = time.monotonic() + self._patience
        while len(tried) < MOST_TRIES:
            if wants_decision(asked):
                await self._decide(asked)
            replica = self._table.choose(asked.model, tried)
            if replica is None:
                if last is not None or time.monotonic() > end:
                    break
                await asyncio.sleep(LOOK_SECONDS)
                continue
            try:
                last = await self._ask(replica, asked)
            except ReplicaError as error:
                self._table.lose(replica)
                self.counts["retries"] += 1
                if error.sent:
                    tried.append(replica)
                continue
            if last.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                return last
            tried.append(replica)
        self.counts["failed"] += 1
        return last or failure("no replica can answer now", HTTPStatus.SERVICE_UNAVAILABLE)

    async def _decide(self, asked: Asked) -> None:
        replica = self._table.choose(None)
        if replica is not None:
            try:
                await decide(asked, self._client, replica.url)
            except httpx.TransportError:
                self._table.lose(replica)

    async def _ask(self, replica: Replica, asked: Asked) -> Response:
        """One try; its place is given back when the answer has ended.

        Raises:
            ReplicaError: Nothing of an answer came.
        """
        replica.opened += 1
        replica.asked += 1
        began, response = False, None
        try:
            response = await self._unless_gone(replica, self._send(replica, asked))
            headers = [
                pair for pair in passed(response.headers.multi_items()) if pair[0] not in asked.said
            ]
            headers += [*asked.said.items(), ("x-deltamux-replica", replica.name)]
            if not _is_stream(response):
                body = await self._unless_gone(replica, _whole(response))
                return await self._whole_answer(replica, response.status_code, body, headers)
            chunks = response.aiter_raw()
            first = await self._unless_gone(replica, _next(chunks))
            relayed = self._relay(replica, response, first, chunks)
            answer = StreamingResponse(relayed, response.status_code)
            answer.raw_headers = _raw(headers)
            began = True
            return answer
        finally:
            if not began:
                replica.opened -= 1
                if response is not None:
                    await response.aclose()

    async def _send(self, replica: Replica, asked: Asked) -> httpx.Response:
        request = self._client.build_request(
            asked.method, replica.url + asked.path, headers=asked.headers, content=asked.body
        )
        try:
            return await self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ReplicaError(sent=False) from error

    async def _whole_answer(
        self, replica: Replica, status: int, body: bytes, headers: list[tuple[str, str]]
    ) -> Response:
        """An answer that is there; that of an engine that has died counts as none.

        Raises:
            ReplicaError: The engine has died.
        """
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            try:
                alive = await healthy(self._client, replica.url)
            except httpx.TimeoutException:
                alive = False
            if not alive:
                raise ReplicaError(sent=True)
        answer = Response(body, status)
        answer.raw_headers = _raw([*headers, ("content-length", str(len(body)))])
        return answer

    async def _unless_gone(self, replica: Replica, work: Any) -> Any:
        """The result of some work with a replica.

        Raises:
            ReplicaError: The replica broke off, or is known to have gone.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(replica.gone.wait())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ReplicaError(sent=True)
            return task.result()
        except httpx.TransportError as error:
            raise ReplicaError(sent=True) from error
        finally:
            task.cancel()
            gone.cancel()

    async def _relay(
        self, replica: Replica, response: httpx.Response, first: bytes, rest: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        try:
            yield first
            async for chunk in rest:
                yield chunk
        except httpx.TransportError:
            # The client has read a part: that the connection ends early tells it that the rest is missing.
            self._table.lose(replica)
            self.counts["broken"] += 1
            raise
        finally:
            replica.opened -= 1
            await response.aclose()


async def healthy(client: httpx.AsyncClient, url: str) -> bool:
    """Whether a replica's engine is alive.

    Raises:
        httpx.TimeoutException: It does not say.
    """
    try:
        answer = await client.get(f"{url}/health", timeout=10)
    except httpx.TimeoutException:
        raise
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK


def failure(message: str, status: HTTPStatus) -> JSONResponse:
    """An error in the OpenAI body."""
    error = {"message": message, "type": "ServiceUnavailableError", "param": None}
    return JSONResponse({"error": error | {"code": status.value}}, status.value)


def _is_stream(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("text/event-stream")


async def _whole(response: httpx.Response) -> bytes:
    """The body as it came, compressed where it is."""
    try:
        return b"".join([chunk async for chunk in response.aiter_raw()])
    finally:
        await response.aclose()


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    return await anext(chunks, b"")


def _raw(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
