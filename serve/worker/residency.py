"""Where experts are, in the engine's worker: disk → host cache → slots, while tokens flow.

    load     disk → host, by the decoder's process           (threads that serve orders)
    enter    host → slot, one copy into a slot that no step reads   (threads that serve orders)
    begin    a step starts: its experts' slots are looked up     (the engine's thread)

One lock guards the tables, and nobody holds it while bytes move. A slot is free for another expert when its
expert is in no open step and in no request that the API server reports as running. An expert that a step needs
and that is not in a slot is brought in by the step itself, which makes the whole batch wait: a stall, counted.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from threading import Condition, Lock
from typing import NamedTuple

import torch

from deltamux.serve.names import public_name
from deltamux.serve.status import ExpertStatus, Histogram, WorkerStatus, publish
from deltamux.serve.worker.host_cache import HostCache
from deltamux.serve.worker.slots import Slots

logger = logging.getLogger("vllm.deltamux")

# Seconds that an order waits for a slot to become free before it gives up.
PATIENCE = 30.0


class Wanted(NamedTuple):
    """One version of an expert, as a LoRA request names it."""

    expert_id: int
    name: str
    path: str


class Residency:
    """The experts of one worker; every method may be called from any thread.

    Attributes:
        resident: Expert id → slot, least recently used first.
        status: What is published.

    Args:
        slots: Their memory.
        host: The host cache.
        read: From an expert's versioned path to its image; raises ValueError.
        nothing: The image of an expert that changes nothing.
    """

    def __init__(
        self,
        slots: Slots,
        host: HostCache,
        read: Callable[[str], torch.Tensor],
        nothing: torch.Tensor,
    ) -> None:
        self.slots = slots
        self.host = host
        self.status = WorkerStatus()
        self.resident: OrderedDict[int, int] = OrderedDict()
        self.pinned: set[int] = set()
        self._read = read
        self._nothing = nothing
        self._names: dict[int, str] = {}
        self._filling: dict[int, int] = {}
        self._loading: dict[int, Future[None]] = {}
        # Of the open step: its experts, and the slots that it reads.
        self._step: dict[int, int] = {}
        self._step_done: torch.cuda.Event | None = None
        self._changed = Condition()
        self._publishing = Lock()

    def load(self, wanted: Wanted) -> None:
        """Bring an expert into the host cache; one that is on its way is waited for.

        Raises:
            ValueError: The artifact is refused; the message says why.
        """
        with self._changed:
            if wanted.expert_id in self.host and self._expert(wanted.expert_id).error is None:
                self.host.get(wanted.expert_id)
                return
            under_way = self._loading.get(wanted.expert_id)
            mine = self._loading.setdefault(wanted.expert_id, Future())
        if under_way is not None:
            under_way.result()
            return
        try:
            self._load(wanted)
        except BaseException as error:
            self._finish(wanted, error)
            raise
        self._finish(wanted, None)
        assert mine.done()

    def enter(self, wanted: Wanted, keep: Collection[int], pin: bool = False) -> None:
        """Bring an expert into a slot that nobody needs; no step waits for it.

        Args:
            wanted: The expert.
            keep: Experts whose slots must stay theirs.
            pin: Let it keep the slot.

        Raises:
            ValueError: It is refused, or no slot becomes free.
        """
        if pin:
            self._check_pin(wanted.expert_id)
        end = time.monotonic() + PATIENCE
        while not self._is_in_slot(wanted.expert_id):
            self.load(wanted)
            with self._changed:
                slot = self._place(wanted.expert_id, keep)
                if slot is None:
                    self._wait(end)
                    continue
                if wanted.expert_id not in self.host:
                    continue  # another one took its place there
                image = self.host.get(wanted.expert_id)
                self._filling[wanted.expert_id] = slot
            self._fill(wanted.expert_id, slot, image)
        if pin:
            with self._changed:
                self.pinned.add(wanted.expert_id)
                self.host.pin(wanted.expert_id)
        self.publish()

    def begin(self, requests: Iterable[Wanted]) -> dict[int, int]:
        """A step starts.

        Returns:
            The slot of each of its experts.
        """
        wanted = {each.expert_id: each for each in requests}
        with self._changed:
            self._step = {}
            for expert_id in wanted:
                slot = self.resident.get(expert_id)
                if slot is not None:
                    self.resident.move_to_end(expert_id)
                    self._step[expert_id] = slot
            missing = [each for each in wanted.values() if each.expert_id not in self._step]
        for each in missing:
            self._enter_now(each, wanted)
        return self._step

    def end(self, done: torch.cuda.Event | None = None) -> None:
        """The open step has ended; on a GPU, where it may still run, `done` says when."""
        with self._changed:
            self._step = {}
            self._step_done = done or self._step_done
            self._changed.notify_all()

    def leave(self, expert_id: int) -> None:
        """Free an expert's slot and its host memory, pinned or not; it stays known."""
        with self._changed:
            self._settle(expert_id)
            self.resident.pop(expert_id, None)
            self.pinned.discard(expert_id)
            image = self.host.remove(expert_id)
            self._changed.notify_all()
        del image
        self.publish()

    def remove(self, expert_id: int) -> bool:
        """Forget an expert; false if it was not known."""
        known = expert_id in self.ids()
        self.leave(expert_id)
        with self._changed:
            self.status.experts.pop(expert_id, None)
            self._names.pop(expert_id, None)
        self.publish()
        return known

    def ids(self) -> set[int]:
        """Experts in slots or in the host cache."""
        with self._changed:
            return set(self.resident) | {each for each in self.status.experts if each in self.host}

    def add_nothing(self, expert_id: int) -> None:
        """Know an expert that changes nothing."""
        with self._changed:
            self.host.put(expert_id, self._nothing)
            self._expert(expert_id)

    def publish(self) -> None:
        """Tell the API server."""
        with self._publishing:
            publish(self._described())

    def _described(self) -> str:
        with self._changed:
            for expert_id, expert in self.status.experts.items():
                expert.slot = self.resident.get(expert_id)
                expert.pinned = expert_id in self.pinned
                expert.host_bytes = self.host.bytes_of(expert_id)
                in_host = "host" if expert_id in self.host else "disk"
                expert.tier = in_host if expert.slot is None else "slot"
            self.status.memory_bytes["host_cache"] = self.host.num_bytes
            return self.status.model_dump_json()

    def _load(self, wanted: Wanted) -> None:
        start = time.perf_counter()
        image = self._read(wanted.path)
        with self._changed:
            expert = self._expert(wanted.expert_id)
            if expert.error is not None:
                # What a slot holds of it is what was there while it was refused: it is copied anew.
                self.resident.pop(wanted.expert_id, None)
            evicted = self.host.put(wanted.expert_id, image)
            expert.error = None
            self._names[wanted.expert_id] = public_name(wanted.name)
            self._count(wanted.expert_id, "host", time.perf_counter() - start)
        for expert_id in evicted:
            logger.info("deltamux: expert %d left the host cache", expert_id)

    def _finish(self, wanted: Wanted, error: BaseException | None) -> None:
        with self._changed:
            future = self._loading.pop(wanted.expert_id)
            self._changed.notify_all()
        self.publish()
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _enter_now(self, wanted: Wanted, batch: Collection[int]) -> None:
        """Within a step: everybody waits."""
        start = time.monotonic()
        with self._changed:
            self._settle(wanted.expert_id)
            slot = self.resident.get(wanted.expert_id)
        if slot is None:
            image = self._image_now(wanted)
            begin = time.perf_counter()
            slot = self._slot_now(batch)
            self.slots.load(slot, image)
            with self._changed:
                self.resident[wanted.expert_id] = slot
                self._count(wanted.expert_id, "slot", time.perf_counter() - begin)
        with self._changed:
            self._step[wanted.expert_id] = slot
            expert = self._expert(wanted.expert_id)
            expert.swapped_at = time.monotonic()
            expert.swap_seconds = expert.swapped_at - start
            if wanted.expert_id in self._names:  # no dummy of vLLM's warm-up
                self.status.stalls += 1
        self.publish()

    def _image_now(self, wanted: Wanted) -> torch.Tensor:
        """An image within a step, where an exception would end the engine for everybody.

        Should the artifact have gone bad, its running requests get the base's output, and new ones are refused
        with the reason.
        """
        with self._changed:
            if wanted.expert_id in self.host:
                return self.host.get(wanted.expert_id)
            self._names[wanted.expert_id] = public_name(wanted.name)
        try:
            self.load(wanted)
        except Exception as error:
            logger.exception("deltamux: cannot load expert %r", wanted.name)
            with self._changed:
                self.host.put(wanted.expert_id, self._nothing)
                self._expert(wanted.expert_id).error = str(error)
        with self._changed:
            # Another load may have taken its place at once.
            return (
                self.host.get(wanted.expert_id) if wanted.expert_id in self.host else self._nothing
            )

    def _slot_now(self, batch: Collection[int]) -> int:
        """A slot for an expert of the step that starts; there are as many as a batch may have experts.

        vLLM's scheduler knows the number of slots but not the pins: a batch that needs every slot takes a pinned
        one too.
        """
        with self._changed:
            while True:
                taken = {*self.resident.values(), *self._filling.values()}
                free = set(range(self.slots.count)) - taken
                if free:
                    return min(free)
                idle = [each for each in self.resident if each not in batch]
                if idle:
                    return self._evict(min(idle, key=lambda each: each in self.pinned))
                self._changed.wait()

    def _is_in_slot(self, expert_id: int) -> bool:
        with self._changed:
            if expert_id not in self.resident or self._expert(expert_id).error is not None:
                return False
            self.resident.move_to_end(expert_id)
            return True

    def _place(self, expert_id: int, keep: Collection[int]) -> int | None:
        """A slot for an expert; None: not yet."""
        if expert_id in self._filling:
            return None
        busy = {*self._step.values(), *self._filling.values()}
        free = set(range(self.slots.count)) - set(self.resident.values()) - busy
        if free:
            return min(free)
        for each, slot in self.resident.items():
            if each not in keep and each not in self.pinned and slot not in busy:
                return self._evict(each)
        return None

    def _evict(self, expert_id: int) -> int:
        self.status.evictions += 1
        return self.resident.pop(expert_id)

    def _fill(self, expert_id: int, slot: int, image: torch.Tensor) -> None:
        start = time.perf_counter()
        try:
            self.slots.load_aside(slot, image, self._step_done)
            with self._changed:
                self.resident[expert_id] = slot
                self._count(expert_id, "slot", time.perf_counter() - start)
        finally:
            with self._changed:
                del self._filling[expert_id]
                self._changed.notify_all()

    def _settle(self, expert_id: int) -> None:
        """Wait until an expert is not being copied."""
        while expert_id in self._filling:
            self._changed.wait()

    def _wait(self, end: float) -> None:
        if not self._changed.wait(max(end - time.monotonic(), 0.0)) and time.monotonic() >= end:
            raise ValueError(
                f"no slot became free within {PATIENCE:.0f} s: all {self.slots.count} are needed by "
                "running requests; set more `slots`"
            )

    def _check_pin(self, expert_id: int) -> None:
        with self._changed:
            full = expert_id not in self.pinned and len(self.pinned) + 1 >= self.slots.count
        if full:
            raise ValueError(
                f"pinning expert {expert_id} would pin all {self.slots.count} slots: "
                "one must stay free for the others"
            )

    def _expert(self, expert_id: int) -> ExpertStatus:
        return self.status.experts.setdefault(expert_id, ExpertStatus())

    def _count(self, expert_id: int, tier: str, seconds: float) -> None:
        name = self._names.get(expert_id)
        if name is None:  # a dummy of vLLM's warm-up
            return
        swaps = self.status.swaps.setdefault(name, {})
        swaps[tier] = swaps.get(tier, 0) + 1
        self.status.swap_seconds.setdefault(tier, Histogram()).observe(seconds)
