"""Which rows of a batch belong to which slot.

Rewritten in place before an engine step, read by the products. Row r belongs to slot `slot_of_row[r]`
(−1: the base). The rows of slot s are `order[starts[s]:starts[s + 1]]`; rows of the base stand in front of
`starts[0]`, and padding behind the batch is in no slot's span.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

BASE_ROW = -1
# Host copies in flight: a step's copy may still be read while the next step's is written.
STAGES = 4


class RowMap:
    """Slot membership of the rows of one kind (tokens, or sampled positions).

    Attributes:
        slot_of_row: [max_rows] on the device; int64 on a CPU, int32 elsewhere, like the two that follow.
        order: [max_rows] on the device, rows grouped by slot, ascending within one.
        starts: [slots + 1] on the device.
        starts_host: The same on the CPU.
        count: Rows of the current batch.
        active: Whether any of them belongs to a slot.
    """

    def __init__(self, max_rows: int, slots: int, device: torch.device) -> None:
        dtype = torch.int64 if device.type == "cpu" else torch.int32
        self._slots = slots
        self._device = device
        # One buffer, one copy: starts, then slot_of_row, then order.
        self._packed = torch.zeros(slots + 1 + 2 * max_rows, dtype=dtype, device=device)
        sizes = [slots + 1, max_rows, max_rows]
        self.starts, self.slot_of_row, self.order = self._packed.split(sizes)
        self.slot_of_row.fill_(BASE_ROW)
        self.starts_host = torch.zeros(slots + 1, dtype=torch.int64, device="cpu")
        self.count = 0
        self.active = False
        self._rows = np.zeros(0, np.int64)
        self._stages = _Stages(self._packed, STAGES) if device.type != "cpu" else None

    def update(self, slots_of_rows: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Describe the next step's batch.

        Args:
            slots_of_rows: Slot of each row, −1 for the base.
        """
        rows = self._rows = np.asarray(slots_of_rows, np.int64)
        self.count = len(rows)
        order = rows.argsort(kind="stable")
        starts = np.searchsorted(rows[order], np.arange(self._slots + 1))
        self.starts_host.numpy()[:] = starts
        self.active = bool(starts[-1] > starts[0])
        stage = self._packed if self._stages is None else self._stages.take()
        packed = stage.numpy()
        max_rows = len(self.order)
        packed[: self._slots + 1] = starts
        slot_of_row = packed[self._slots + 1 : self._slots + 1 + max_rows]
        slot_of_row[: len(rows)] = rows
        slot_of_row[len(rows) :] = BASE_ROW
        packed[self._slots + 1 + max_rows :][: len(rows)] = order
        if self._stages is not None:
            self._stages.send(stage)

    def span(self, start: int, length: int) -> "RowMap":
        """The map of a run of rows, numbered from its start."""
        part = RowMap(length, self._slots, self._device)
        rows = np.full(length, BASE_ROW, np.int64)
        known = self._rows[start : start + length]
        rows[: len(known)] = known
        part.update(rows)
        return part


class _Stages:
    """Pinned host copies of a device buffer, taken in turn, each not before its last copy is done."""

    def __init__(self, target: torch.Tensor, count: int) -> None:
        self._target = target
        pinned = torch.cuda.is_available()
        self._buffers = [
            torch.zeros(target.shape, dtype=target.dtype, device="cpu", pin_memory=pinned)
            for _ in range(count)
        ]
        self._done = [torch.cuda.Event() for _ in range(count)] if pinned else None
        self._next = 0

    def take(self) -> torch.Tensor:
        if self._done is not None:
            self._done[self._next].synchronize()
        return self._buffers[self._next]

    def send(self, stage: torch.Tensor) -> None:
        self._target.copy_(stage, non_blocking=True)
        if self._done is not None:
            self._done[self._next].record()
        self._next = (self._next + 1) % len(self._buffers)
