"""Who may enter the engine now: requests wait here until their expert is in a slot.

A request whose expert is elsewhere would make every other request of its batch wait for it. So the worker brings
the expert to host memory and into a slot while others go on, and only then the request enters. An expert whose
requests are in the engine is a *member* and keeps its slot; there are at most as many members as slots, so that
vLLM's scheduler never asks for an expert that is not there.

    expert of a request     waits for
    ready member            its own concurrency
    not in host memory      its load (started on arrival)
    not a member            an idle member's slot; after `slot_wait` seconds a busy one is drained for it

A member that drains lets its running requests end and sends no new ones in, so that the longest wait of a cold
expert is `slot_wait` and one request. Among those that wait less than that, and among those that may be drained,
`priority` goes before arrival; a smaller number goes first, as in vLLM.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from deltamux.serve.api.expert import Expert, ExpertError
from deltamux.serve.api.worker import Worker

logger = logging.getLogger("vllm.deltamux")


@dataclass(eq=False)
class Place:
    """What the gate knows of one version of an expert.

    Attributes:
        expert: The version.
        waiting: Requests that have not entered yet, the oldest first, each with its arrival.
        is_member: Whether a slot is reserved for it.
        ready: Whether it is in that slot.
        draining: Whether it must give the slot up.
        in_host: Whether it was loaded.
        since: When it became a member.
    """

    expert: Expert
    waiting: deque[tuple[float, asyncio.Future[None]]] = field(default_factory=deque)
    is_member: bool = False
    ready: bool = False
    draining: bool = False
    in_host: bool = False
    since: int = 0
    task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether its slot could be given away now."""
        return self.ready and not self.expert.busy and not self.expert.pinned

    @property
    def has_room(self) -> bool:
        """Whether one more of its requests may enter."""
        limit = self.expert.limits.concurrency
        return limit is None or self.expert.entered < limit

    def is_late(self, before: float) -> bool:
        """Whether its first request came so long ago."""
        return self.waiting[0][0] <= before

    def order(self, before: float) -> tuple[bool, int, float]:
        """Who is served first: who came before that time, then by priority, then by arrival."""
        late = self.is_late(before)
        return not late, 0 if late else self.expert.limits.priority, self.waiting[0][0]


class Gate:
    """Lets requests into the engine.

    Args:
        worker: Moves experts.
        slots: How many experts may be in the engine at once.
        patience: Seconds that a request waits for a busy slot before one is drained.
        in_slot: Whether the worker says that an expert is in a slot.
    """

    def __init__(
        self, worker: Worker, slots: int, patience: float, in_slot: Callable[[Expert], bool]
    ) -> None:
        self._worker = worker
        self._slots = slots
        self._patience = patience
        self._in_slot = in_slot
        self._places: dict[int, Place] = {}
        self._clock = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, expert: Expert) -> float:
        """Wait until a request may enter; it must `leave` once.

        Returns:
            Seconds that it waited; 0.0 where its expert was in a slot.

        Raises:
            ExpertError: The expert is refused.
        """
        start = time.monotonic()
        place = self._place(expert)
        if place.ready and not self._in_slot(expert):
            # Somebody who uses the engine past the gate took its slot.
            place.ready = False
            self._start(place, self._bring(place))
        was_ready = place.ready and not place.draining
        turn = self._loop.create_future()
        place.waiting.append((start, turn))
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(expert)
            raise
        finally:
            self._forget(place, turn)
        return 0.0 if was_ready else time.monotonic() - start

    def leave(self, expert: Expert) -> None:
        """A request's response has ended."""
        expert.entered -= 1
        expert.rests_since = time.monotonic()
        self.moved()

    def moved(self) -> None:
        """Something ended: let others in, at the event loop's next turn. Any thread may say so."""
        self._loop.call_soon_threadsafe(self._advance)

    async def pin(self, expert: Expert) -> None:
        """Bring an expert into a slot for good, as soon as one can be freed.

        Raises:
            ExpertError: It is refused, or no slot would be left for the others.
        """
        pinned = [each for each in self._places.values() if each.expert.pinned]
        if not expert.pinned and len(pinned) + 1 >= self._slots:
            raise ExpertError(
                f"pinning {expert.name!r} would pin all {self._slots} slots: "
                "one must stay free for the others"
            )
        await self.enter(expert)
        try:
            await self._worker.pin(expert, self._members())
            expert.pinned = True
        finally:
            self.leave(expert)

    async def unpin(self, expert: Expert) -> None:
        """Let an expert's slot go to others who need it; raises as `pin`."""
        await self._worker.unpin(expert)
        expert.pinned = False
        self.moved()

    async def drop(self, expert: Expert) -> None:
        """An expert is about to leave the worker: nothing of it is kept, and what moves comes to its end."""
        place = self._places.pop(expert.request.lora_int_id, None)
        if place is not None:
            if place.task is not None:
                await asyncio.wait({place.task})
            self._fail(place, ExpertError(f"expert {expert.name!r} was removed"))
        self._advance()

    def rest(self, expert: Expert) -> None:
        """Let an expert leave memory if nothing of it runs, waits or moves."""
        place = self._place(expert)
        if expert.holds or expert.busy or place.waiting or place.task is not None:
            return
        if place.is_member or place.in_host:
            place.is_member = place.ready = place.in_host = False
            self._start(place, self._worker.leave(expert))

    def waiting(self) -> dict[str, int]:
        """How many requests wait, by the expert's name; of those who have some."""
        found: dict[str, int] = {}
        for place in list(self._places.values()):
            if place.waiting:
                name = place.expert.name
                found[name] = found.get(name, 0) + len(place.waiting)
        return found

    def loaded(self, expert: Expert) -> None:
        """An expert was brought into host memory."""
        self._place(expert).in_host = True
        expert.rests_since = time.monotonic()

    def _place(self, expert: Expert) -> Place:
        lora_id = expert.request.lora_int_id
        return self._places.setdefault(lora_id, Place(expert))

    def _members(self) -> list[int]:
        return [lora_id for lora_id, place in self._places.items() if place.is_member]

    def _advance(self) -> None:
        """Let in who may enter, and start the moves that others wait for."""
        for place in self._places.values():
            self._admit(place)
        outside = [
            place for place in self._places.values() if place.waiting and not place.is_member
        ]
        for place in outside:
            if not place.in_host and place.task is None:
                self._start(place, self._load(place))
        now = time.monotonic()
        late = 0
        ready = [place for place in outside if place.in_host and place.task is None]
        for place in sorted(ready, key=lambda each: each.order(now - self._patience)):
            if self._make_room():
                place.is_member, place.since = True, next(self._clock)
                self._start(place, self._bring(place))
            elif place.is_late(now - self._patience):
                late += 1
        self._drain(late)
        self._wake(outside, now)

    def _admit(self, place: Place) -> None:
        while place.waiting and place.ready and not place.draining and place.has_room:
            _, turn = place.waiting.popleft()
            if not turn.done():
                place.expert.entered += 1
                turn.set_result(None)

    def _make_room(self) -> bool:
        """Whether there is a slot for one more member; an idle member gives up its own."""
        members = [place for place in self._places.values() if place.is_member]
        if len(members) < self._slots:
            return True
        idle = [place for place in members if place.idle and (place.draining or not place.waiting)]
        if not idle:
            return False
        victim = min(idle, key=lambda place: place.expert.last_used or 0.0)
        victim.is_member = victim.ready = victim.draining = False
        return True

    def _drain(self, wanted: int) -> None:
        """Let as many busy members run out as late experts want."""
        members = [each for each in self._places.values() if each.ready and not each.expert.pinned]
        # Who drains already, then the least urgent, of these who has had its slot for longest.
        members.sort(key=lambda each: (not each.draining, -each.expert.limits.priority, each.since))
        for rank, place in enumerate(members):
            place.draining = rank < wanted
            self._admit(place)

    def _wake(self, outside: list[Place], now: float) -> None:
        """Come back when the next one has waited for long enough."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ends = [place.waiting[0][0] + self._patience for place in outside if place.waiting]
        ahead = [end - now for end in ends if end > now]
        if ahead:
            self._timer = self._loop.call_later(min(ahead), self._advance)

    def _start(self, place: Place, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except ExpertError as error:
                self._fail(place, error)
            except Exception as error:
                logger.exception("deltamux: expert %r could not be moved", place.expert.name)
                self._fail(place, ExpertError(f"{type(error).__name__}: {error}"))
            finally:
                place.task = None
            self._advance()

        place.task = self._loop.create_task(run())

    async def _load(self, place: Place) -> None:
        await self._worker.load(place.expert)
        place.in_host = True

    async def _bring(self, place: Place) -> None:
        """Into a slot; should it have left host memory since, the worker loads it again."""
        await self._worker.enter(place.expert, self._members())
        place.ready, place.draining = True, False

    def _fail(self, place: Place, error: ExpertError) -> None:
        place.is_member = place.ready = place.in_host = False
        while place.waiting:
            _, turn = place.waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def _forget(self, place: Place, turn: asyncio.Future[None]) -> None:
        """Who has gone waits no more."""
        place.waiting = deque(each for each in place.waiting if each[1] is not turn)
