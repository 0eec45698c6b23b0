"""Moves of experts in the engine's worker, beside its steps: disk → host cache → slots.

    load     disk → host, by the decoder's process           (threads that serve orders)
    enter    host → slot, one copy into a slot that no step reads   (threads that serve orders)

One lock guards the tables, and nobody holds it while bytes move. A slot is free for another expert when its own is in no
open step and in no request that the API server reports as running.
"""

import logging
import time
from collections.abc import Callable, Collection
from threading import Condition, Lock

import torch

from deltamux.serve.names import public_name
from deltamux.serve.status import WorkerStatus, publish
from deltamux.serve.worker.host_cache import HostCache
from deltamux.serve.worker.once import Once
from deltamux.serve.worker.ranks import ONE, Ranks
from deltamux.serve.worker.slots import Slots
from deltamux.serve.worker.table import SlotTable, Wanted

logger = logging.getLogger("vllm.deltamux")

# Seconds that an order waits for a slot to become free before it gives up.
PATIENCE = 30.0


class Moves:
    """The experts of one worker, and their moves beside steps; every method may be called from any thread.

    Attributes:
        table: Which expert is in which slot.
        status: What is published.

    Args:
        slots: Their memory.
        host: The host cache.
        read: From an expert's versioned path to its image; raises ValueError.
        nothing: The image of an expert that changes nothing.
        ranks: The workers that share the model.
    """

    def __init__(
        self,
        slots: Slots,
        host: HostCache,
        read: Callable[[str], torch.Tensor],
        nothing: torch.Tensor,
        ranks: Ranks = ONE,
    ) -> None:
        self.slots = slots
        self.host = host
        self.status = WorkerStatus(ranks=ranks.size)
        self._ranks = ranks
        self.table = SlotTable(slots.count)
        self._read = read
        self._nothing = nothing
        self._names: dict[int, str] = {}
        self._loads = Once()
        self._step_done: torch.cuda.Event | None = None
        self._changed = Condition()
        self._publishing = Lock()

    def load(self, wanted: Wanted) -> None:
        """Bring an expert into the host cache; one that is on its way is waited for.

        Raises:
            ValueError: The artifact is refused; the message says why.
        """
        with self._changed:
            if wanted.expert_id in self.host and self.status.expert(wanted.expert_id).error is None:
                self.host.get(wanted.expert_id)
                return
        try:
            self._loads.run(wanted.expert_id, lambda: self._load(wanted))
        finally:
            self.publish()

    def need(self, expert_ids: Collection[int], number: int) -> None:
        """Note whose slots must stay theirs; see `SlotTable.need`."""
        with self._changed:
            self.table.need(expert_ids, number)

    def enter(self, wanted: Wanted, pin: bool = False) -> None:
        """Bring an expert into a slot that nobody needs; no step waits for it.

        Args:
            wanted: The expert.
            pin: Let it keep the slot.

        Raises:
            ValueError: It is refused, or no slot becomes free.
        """
        if pin:
            with self._changed:
                self.table.check_pin(wanted.expert_id)
        end = time.monotonic() + PATIENCE
        while not self._is_in_slot(wanted.expert_id):
            self.load(wanted)
            with self._changed:
                if wanted.expert_id not in self.host:
                    continue  # another one took its place there
                image = self.host.get(wanted.expert_id)
                copied = wanted.expert_id in self.table.filling
                slot = None if copied else self.table.find()
                if slot is None:
                    self._wait(end)
                    continue
                self.table.filling[wanted.expert_id] = slot
            self._fill(wanted.expert_id, slot, image)
        if pin:
            with self._changed:
                self.table.pinned.add(wanted.expert_id)
                self.host.pin(wanted.expert_id)
        self.publish()

    def unpin(self, expert_id: int) -> None:
        """Let an expert's slot and host memory go to others who need them."""
        with self._changed:
            self.table.pinned.discard(expert_id)
            self.host.unpin(expert_id)
            self._changed.notify_all()
        self.publish()

    def leave(self, expert_id: int) -> None:
        """Free an expert's slot and its host memory, pinned or not; it stays known."""
        with self._changed:
            self._settle(expert_id)
            self.table.resident.pop(expert_id, None)
            self.table.pinned.discard(expert_id)
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
            return set(self.table.resident) | {
                each for each in self.status.experts if each in self.host
            }

    def add_nothing(self, expert_id: int) -> None:
        """Know an expert that changes nothing."""
        with self._changed:
            self.host.put(expert_id, self._nothing)
            self.status.expert(expert_id)

    def publish(self) -> None:
        """Tell the API server."""
        with self._publishing:
            publish(self._described(), self._ranks.rank)

    def _described(self) -> str:
        with self._changed:
            for expert_id, expert in self.status.experts.items():
                expert.slot = self.table.resident.get(expert_id)
                expert.pinned = expert_id in self.table.pinned
                expert.host_bytes = self.host.bytes_of(expert_id)
                in_host = "host" if expert_id in self.host else "disk"
                expert.tier = in_host if expert.slot is None else "slot"
            self.status.evictions = self.table.evictions
            self.status.memory_bytes["host_cache"] = self.host.num_bytes
            return self.status.model_dump_json()

    def _load(self, wanted: Wanted) -> None:
        start = time.perf_counter()
        image = self._read(wanted.path)
        with self._changed:
            expert = self.status.expert(wanted.expert_id)
            if expert.error is not None:
                # What a slot holds of it is what was there while it was refused: it is copied anew.
                self.table.resident.pop(wanted.expert_id, None)
            evicted = self.host.put(wanted.expert_id, image)
            expert.error = None
            self._names[wanted.expert_id] = public_name(wanted.name)
            self.status.count_swap(
                self._names.get(wanted.expert_id), "host", time.perf_counter() - start
            )
        for expert_id in evicted:
            logger.info("deltamux: expert %d left the host cache", expert_id)

    def _is_in_slot(self, expert_id: int) -> bool:
        with self._changed:
            missing = expert_id not in self.table.resident
            if missing or self.status.expert(expert_id).error is not None:
                return False
            self.table.resident.move_to_end(expert_id)
            return True

    def _fill(self, expert_id: int, slot: int, image: torch.Tensor) -> None:
        start = time.perf_counter()
        try:
            self.slots.load_aside(slot, image, self._step_done)
            with self._changed:
                self.table.resident[expert_id] = slot
                self.status.count_swap(
                    self._names.get(expert_id), "slot", time.perf_counter() - start
                )
        finally:
            with self._changed:
                del self.table.filling[expert_id]
                self._changed.notify_all()

    def _settle(self, expert_id: int) -> None:
        """Wait until an expert is not being copied."""
        while expert_id in self.table.filling:
            self._changed.wait()

    def _wait(self, end: float) -> None:
        if not self._changed.wait(max(end - time.monotonic(), 0.0)) and time.monotonic() >= end:
            raise ValueError(
                f"no slot became free within {PATIENCE:.0f} s: all {self.slots.count} are needed by "
                "running requests; set more `slots`"
            )
