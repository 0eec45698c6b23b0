"""The engine's worker as the API server's process talks to it (see `serve/control.py`)."""

import asyncio
import itertools
import json
from collections.abc import Coroutine
from typing import Any

from deltamux.serve.api.expert import Expert, ExpertError
from deltamux.serve.control import LONGEST_LINE, Order, encode, socket_path

# Between looks at whether the engine is still there, while it is waited for. Chosen, not measured.
ENGINE_POLL_SECONDS = 0.5


# What brings an expert somewhere; what one rank refuses, no other keeps.
BRINGING = ("load", "enter", "pin")


class Worker:
    """Gives orders about experts, each over a connection of its own to each rank.

    Args:
        ranks: Workers that share the model.
    """

    def __init__(self, ranks: int = 1) -> None:
        self._numbers = itertools.count(1)
        self._ranks = ranks

    async def check(self, expert: Expert) -> None:
        """See whether an expert could be loaded.

        Raises:
            ExpertError: It would be refused, or the worker has gone.
        """
        await self._give("check", expert)

    async def load(self, expert: Expert) -> None:
        """Bring an expert into the host cache.

        Raises:
            ExpertError: It is refused, or the worker has gone.
        """
        await self._give("load", expert)

    async def enter(self, expert: Expert, keep: list[int]) -> None:
        """Bring an expert into a slot; experts in `keep` keep theirs.

        Raises:
            ExpertError: It is refused, or no slot is free.
        """
        await self._give("enter", expert, keep)

    async def pin(self, expert: Expert, keep: list[int]) -> None:
        """Bring an expert into a slot for good.

        Raises:
            ExpertError: It is refused, or no slot is to spare.
        """
        await self._give("pin", expert, keep)

    async def unpin(self, expert: Expert) -> None:
        """Let an expert's slot go to others who need it.

        Raises:
            ExpertError: The worker has gone.
        """
        await self._give("unpin", expert)

    async def leave(self, expert: Expert) -> None:
        """Free an expert's slot and host memory."""
        await self._give("leave", expert)

    async def remove(self, expert: Expert) -> None:
        """Forget an expert."""
        await self._give("remove", expert)

    async def _give(self, order: str, expert: Expert, keep: list[int] | None = None) -> None:
        request: Any = expert.request
        content = {
            "order": order,
            "expert_id": request.lora_int_id,
            "name": request.lora_name,
            "path": request.lora_path,
            "keep": keep or [],
            "number": next(self._numbers),
        }
        refusals = await self._tell(Order.model_validate(content))
        if not refusals:
            return
        if self._ranks > 1 and order in BRINGING:
            content |= {"order": "remove", "keep": [], "number": next(self._numbers)}
            await self._tell(Order.model_validate(content))
        raise refusals[0]

    async def _tell(self, order: Order) -> list[ExpertError]:
        """Give an order to all ranks; returns what those that refused it say."""
        answers = (_carried_out(order, rank) for rank in range(self._ranks))
        replies = await asyncio.gather(*answers, return_exceptions=True)
        others = [each for each in replies if each and not isinstance(each, ExpertError)]
        if others:
            raise others[0]
        return [each for each in replies if isinstance(each, ExpertError)]


async def _carried_out(order: Order, rank: int) -> None:
    reply = await _answer(order, rank)
    if "error" in reply:
        raise ExpertError(reply["error"])


async def _answer(order: Order, rank: int) -> dict[str, Any]:
    try:
        path = str(socket_path(rank))
        reader, writer = await asyncio.open_unix_connection(path, limit=LONGEST_LINE)
    except OSError as error:
        raise ExpertError(f"the engine's worker does not listen: {error}") from error
    try:
        writer.write(encode(order.model_dump()))
        line = await reader.readline()
    finally:
        writer.close()
    if not line:
        raise ExpertError("the engine's worker ended before it answered")
    reply: dict[str, Any] = json.loads(line)
    return reply


async def answered(engine: Any, call: Coroutine[Any, Any, Any]) -> Any:
    """The engine's answer to a call; an engine that has ended gives none, and vLLM would wait for it.

    Raises:
        ExpertError: The engine has ended meanwhile.
    """
    task = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({task}, timeout=ENGINE_POLL_SECONDS))[0]:
            if engine.errored:
                raise ExpertError("the engine has ended: ask again when the server is back")
        return task.result()
    finally:
        task.cancel()
