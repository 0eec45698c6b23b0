"""Where experts are, in the engine's worker, while tokens flow.

    begin    a step starts: its experts' slots are looked up     (the engine's thread)
    end      its slots may be changed again

Between steps experts move by themselves (`moves.py`). A step brings in what it lacks: a stall, counted. Of several ranks
each brings in its part, and all agree whether one could not.
"""

import logging
import time
from collections.abc import Collection, Iterable

import torch

from deltamux.serve.names import public_name
from deltamux.serve.worker.moves import Moves
from deltamux.serve.worker.table import Wanted

logger = logging.getLogger("vllm.deltamux")


class Residency(Moves):
    """The experts of one worker, with its steps."""

    def begin(self, requests: Iterable[Wanted]) -> dict[int, int]:
        """A step starts.

        Returns:
            The slot of each of its experts.
        """
        wanted = {each.expert_id: each for each in requests}
        with self._changed:
            missing = self.table.begin(wanted)
        for expert_id in missing:
            self._enter_now(wanted[expert_id], wanted)
        if self._ranks.size > 1:
            self._agree()
        return self.table.step

    def end(self, done: torch.cuda.Event | None = None) -> None:
        """The open step has ended; on a GPU, where it may still run, `done` says when."""
        with self._changed:
            self.table.step = {}
            self._step_done = done or self._step_done
            self._changed.notify_all()

    def _enter_now(self, wanted: Wanted, batch: Collection[int]) -> None:
        """Within a step: everybody waits."""
        start = time.monotonic()
        with self._changed:
            self._settle(wanted.expert_id)
            slot = self.table.resident.get(wanted.expert_id)
        if slot is None:
            image = self._image_now(wanted)
            begin = time.perf_counter()
            slot = self._slot_now(batch)
            self.slots.load(slot, image)
            with self._changed:
                self.table.resident[wanted.expert_id] = slot
                self.status.count_swap(
                    self._names.get(wanted.expert_id), "slot", time.perf_counter() - begin
                )
        with self._changed:
            self.table.step[wanted.expert_id] = slot
            expert = self.status.expert(wanted.expert_id)
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
                self.status.expert(wanted.expert_id).error = str(error)
        with self._changed:
            # Another load may have taken its place at once.
            return (
                self.host.get(wanted.expert_id) if wanted.expert_id in self.host else self._nothing
            )

    def _agree(self) -> None:
        """What another rank could not load for this step is the base's here too."""
        expert_ids = sorted(self.table.step)
        with self._changed:
            refused = [self._is_refused(each) for each in expert_ids]
        anywhere = self._ranks.largest(refused)
        for expert_id, here, there in zip(expert_ids, refused, anywhere, strict=True):
            if there and not here:
                self.slots.load(self.table.step[expert_id], self._nothing)
                with self._changed:
                    self.host.put(expert_id, self._nothing)
                    self.status.expert(expert_id).error = "another rank could not load it"
                self.publish()

    def _is_refused(self, expert_id: int) -> bool:
        return self.status.expert(expert_id).error is not None

    def _slot_now(self, batch: Collection[int]) -> int:
        with self._changed:
            while (slot := self.table.find_now(batch)) is None:
                self._changed.wait()
            return slot
