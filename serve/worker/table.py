"""Which expert is in which slot, and whose slot another one may have; guarded by its owner's lock."""

from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple


class Wanted(NamedTuple):
    """One version of an expert, as a LoRA request names it."""

    expert_id: int
    name: str
    path: str


class SlotTable:
    """Slots by expert id.

    Attributes:
        resident: Experts in slots, least recently used first.
        pinned: Experts that keep theirs.
        filling: Experts that are being copied, and into which slot.
        step: Experts of the open step, and the slots that it reads.
        evictions: How many lost their slot to another.
        needed: Experts whose slots must stay theirs, as the API server last said.

    Args:
        count: Slots.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.resident: OrderedDict[int, int] = OrderedDict()
        self.pinned: set[int] = set()
        self.filling: dict[int, int] = {}
        self.step: dict[int, int] = {}
        self.evictions = 0
        self.needed: frozenset[int] = frozenset()
        self._said = 0

    def need(self, expert_ids: Collection[int], number: int) -> None:
        """The API server says whose slots are needed; what it said earlier and comes later counts no more."""
        if number >= self._said:
            self.needed, self._said = frozenset(expert_ids), number

    def begin(self, expert_ids: Collection[int]) -> list[int]:
        """A step opens; returns those of its experts that are in no slot."""
        self.step = {}
        for expert_id in expert_ids:
            if expert_id in self.resident:
                self.resident.move_to_end(expert_id)
                self.step[expert_id] = self.resident[expert_id]
        return [each for each in expert_ids if each not in self.step]

    def find(self) -> int | None:
        """A slot that no step reads and that nobody needs; None: there is none now."""
        busy = {*self.step.values(), *self.filling.values()}
        free = set(range(self.count)) - set(self.resident.values()) - busy
        if free:
            return min(free)
        for each, slot in self.resident.items():
            if each not in self.needed and each not in self.pinned and slot not in busy:
                return self._evict(each)
        return None

    def find_now(self, batch: Collection[int]) -> int | None:
        """A slot for an expert of the step that starts; None: one is being filled, which must end first.

        vLLM's scheduler knows the number of slots but not the pins: a batch that needs every slot takes a pinned
        one too.
        """
        taken = {*self.resident.values(), *self.filling.values()}
        free = set(range(self.count)) - taken
        if free:
            return min(free)
        idle = [each for each in self.resident if each not in batch]
        return self._evict(min(idle, key=lambda each: each in self.pinned)) if idle else None

    def check_pin(self, expert_id: int) -> None:
        """Refuse a pin that would leave no slot for the others.

        Raises:
            ValueError: The message says so.
        """
        if expert_id not in self.pinned and len(self.pinned) + 1 >= self.count:
            raise ValueError(
                f"pinning expert {expert_id} would pin all {self.count} slots: "
                "one must stay free for the others"
            )

    def _evict(self, expert_id: int) -> int:
        self.evictions += 1
        return self.resident.pop(expert_id)
