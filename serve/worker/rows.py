"""Which rows of a batch belong to which slot.

Rewritten in place before every engine step, read inside the custom ops. Row r belongs to slot
`slot_of_row[r]` (−1: the base). The rows of slot s are `order[starts[s]:starts[s + 1]]`; rows of the
base, and padding behind the batch, are in no slot's span.
"""

from collections.abc import Sequence

import torch


class RowMap:
    """Slot membership of the rows of one kind (tokens, or sampled positions).

    Attributes:
        slot_of_row: int64 [max_rows] on the device.
        order: int64 [max_rows] on the device, rows grouped by slot, ascending within one.
        starts: int64 [slots + 1] on the CPU.
        count: Rows of the current batch.
    """

    def __init__(self, max_rows: int, slots: int, device: torch.device) -> None:
        self.slot_of_row = torch.full((max_rows,), -1, dtype=torch.int64, device=device)
        self.order = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.starts = torch.zeros(slots + 1, dtype=torch.int64)
        self.count = 0
        self._slots = slots

    def update(self, slots_of_rows: Sequence[int] | torch.Tensor) -> None:
        """Describe the next step's batch.

        Args:
            slots_of_rows: Slot of each row, −1 for the base.
        """
        rows = torch.as_tensor(slots_of_rows, dtype=torch.int64).cpu()
        self.count = len(rows)
        self.slot_of_row.fill_(-1)
        self.slot_of_row[: len(rows)] = rows.to(self.slot_of_row.device, non_blocking=True)
        grouped = torch.sort(rows, stable=True)
        self.starts.copy_(torch.searchsorted(grouped.values, torch.arange(self._slots + 1)))
        order = grouped.indices.to(self.order.device, non_blocking=True)
        self.order[: len(rows)] = order

    def span(self, start: int, length: int) -> "RowMap":
        """The map of a run of rows, numbered from its start."""
        part = RowMap(length, self._slots, self.order.device)
        part.update(self.slot_of_row[start : start + length])
        return part
