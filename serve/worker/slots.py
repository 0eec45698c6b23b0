"""Slots: one flat buffer on the device, an expert's image in each (see `compression/image/layout.py`).

The buffer is allocated once and never moves, so that captured graphs keep its address. Everything that differs
between experts (where planes lie, how many there are, escapes, factors) is read from the slot itself: to bring
an expert in is one copy.
"""

import ctypes
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from deltamux.compression.image.layout import (
    HEADER_BYTES,
    RECORD_FIELDS,
    UNIT,
    Field,
    head_bytes,
    slot_size,
)
from deltamux.serve.worker.native import host_slots

_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = ctypes.c_void_p


def _copy(target: int, source: int, num_bytes: int) -> None:
    """One copy on this thread: torch would share it among threads that the engine's step uses."""
    _memmove(target, source, num_bytes)


class Slots:
    """Device memory for resident experts.

    Attributes:
        buffer: uint8 [slots, bytes], a slot's image from its start on.

    Args:
        count: Experts resident at once.
        num_bytes: What the largest image may take.
        names: The base's tensors in its own order.
        device: The model's device.
        rank: The largest rank of factors that an expert may have; 0: none has any.
    """

    def __init__(
        self,
        count: int,
        num_bytes: int,
        names: Sequence[str],
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self.rank = rank
        self._index = {name: index for index, name in enumerate(names)}
        self._head = head_bytes(len(names))
        size = slot_size(max(num_bytes, self._head))
        if device.type == "cpu":
            self.buffer = host_slots(count, size)
        else:
            self.buffer = torch.zeros(count, size, dtype=torch.uint8, device=device)
        # What the slots' tables say, for those who ask on the host.
        self._tables = np.zeros((count, len(names), RECORD_FIELDS), np.int32)
        self._side = None if device.type == "cpu" else torch.cuda.Stream(device)

    @property
    def on_cpu(self) -> bool:
        """Whether they are in host memory."""
        return self.buffer.device.type == "cpu"

    @property
    def count(self) -> int:
        """Experts resident at once."""
        return self.buffer.shape[0]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.buffer.shape[1]

    @property
    def names(self) -> Collection[str]:
        """The base's weights."""
        return self._index.keys()

    def index(self, name: str) -> int:
        """The record of a weight of the base."""
        return self._index[name]

    def load(self, slot: int, image: torch.Tensor) -> None:
        """Copy an expert's image into a slot, in the order of the current stream; it fits (see `capacity.py`)."""
        self.buffer[slot, : image.numel()].copy_(image)
        self._tables[slot] = self._table(image)

    def load_aside(self, slot: int, image: torch.Tensor, after: torch.cuda.Event | None) -> None:
        """Copy an expert's image into a slot that no step reads, beside the engine's steps.

        It returns when the image is there. On a CPU it is a copy by this thread alone, which leaves the
        interpreter to others; on a GPU one on a stream of its own.

        Args:
            slot: Free.
            image: In host memory, pinned for a GPU.
            after: What the device has to have reached first: the end of the last step that read the slot.
        """
        if self._side is None:
            _copy(self.buffer[slot].data_ptr(), image.data_ptr(), image.numel())
        else:
            with torch.cuda.stream(self._side):
                if after is not None:
                    self._side.wait_event(after)
                self.buffer[slot, : image.numel()].copy_(image, non_blocking=True)
            self._side.synchronize()
        self._tables[slot] = self._table(image)

    def vector(self, slot: int, entry: int, size: int) -> torch.Tensor | None:
        """A record's float32 vector [size] in a slot; None where it has none."""
        start = int(self._tables[slot, entry, Field.VECTOR]) * UNIT
        return self.buffer[slot, start : start + 4 * size].view(torch.float32) if start else None

    def _table(self, image: torch.Tensor) -> npt.NDArray[np.int32]:
        table = image[HEADER_BYTES : self._head].numpy().view(np.int32)
        return table.reshape(-1, RECORD_FIELDS)
