"""Slot images made field by field: an independent reading of the layout, for tests."""

import struct
from dataclasses import dataclass, field

import torch

BLOCK = 4096


@dataclass
class Weight:
    """What one weight of an image holds; all that is None is absent.

    `codes` are uint8 [R, K] below 4 or 16, `escapes` (row, column, d) in any order.
    """

    rows: int
    columns: int
    planes: int = 0
    codes: torch.Tensor | None = None
    zero: float = 0.0
    step: float = 1.0
    steps: torch.Tensor | None = None
    escapes: list[tuple[int, int, int]] = field(default_factory=list)
    coded: torch.Tensor | None = None  # bool [N]
    channels: torch.Tensor | None = None
    values: torch.Tensor | None = None
    right: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right_steps: torch.Tensor | None = None
    left_steps: torch.Tensor | None = None
    vector: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """Δ̂ in float64, from the definition."""
        delta = torch.zeros(self.rows, self.columns, dtype=torch.float64)
        coded_rows = self.rows if self.coded is None else int(self.coded.sum())
        levels = torch.zeros(coded_rows, self.columns, dtype=torch.float64)
        if self.planes:
            assert self.codes is not None
            levels += self.codes.double() - self.zero
        for row, column, extra in self.escapes:
            levels[row, column] += extra
        step = self.step if self.steps is None else self.steps.double().unsqueeze(1)
        if self.planes or self.escapes:
            if self.coded is None:
                delta += levels * step
            else:
                delta[self.coded] += levels * step
        if self.channels is not None:
            assert self.values is not None
            delta[:, self.channels.long()] += self.values.double()
        if self.right is not None:
            assert self.left is not None
            right, left = self.right.double(), self.left.double()
            if self.right_steps is not None and self.left_steps is not None:
                right *= self.right_steps.double().unsqueeze(1)
                left *= self.left_steps.double().unsqueeze(1)
            delta += left @ right
        return delta


class _Sections:
    """Sections behind one another, each from a multiple of 64 bytes on."""

    def __init__(self, start: int) -> None:
        self.content = bytearray(start)

    def add(self, tensor: torch.Tensor | None) -> int:
        """Append a tensor; its offset in units of 64 bytes."""
        if tensor is None:
            return 0
        self.content.extend(bytes(-len(self.content) % 64))
        offset = len(self.content) // 64
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        self.content.extend(raw.numpy().tobytes())
        return offset


def pack_plane(codes: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 64) * 64, dtype=torch.int32)
    padded[:, :columns] = codes
    quads = padded.view(rows, -1, 4)
    return (quads << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)


def build_image(weights: list[Weight | None]) -> torch.Tensor:
    """One expert's image, uint8 [bytes]; None: a weight that does not change."""
    table_end = 128 + 128 * len(weights)
    sections = _Sections(table_end)
    for index, weight in enumerate(weights):
        if weight is None:
            continue
        record = struct.pack("<6i2f24i", *_record(weight, sections))
        sections.content[128 + 128 * index : 256 + 128 * index] = record
    sections.content.extend(bytes(-len(sections.content) % 256))
    header = struct.pack("<4i", 0x584D4C44, 1, len(weights), len(sections.content) // 64)
    sections.content[: len(header)] = header
    return torch.frombuffer(sections.content, dtype=torch.uint8)


def _record(weight: Weight, sections: _Sections) -> list[float]:
    fields: list[float] = [0] * 32
    coded_rows = weight.rows if weight.coded is None else int(weight.coded.sum())
    blocks = -(-weight.columns // BLOCK)
    fields[0] = weight.planes
    fields[1], fields[2] = coded_rows, weight.columns
    fields[3] = 16 * -(-weight.columns // 64)
    for plane in range(weight.planes):
        assert weight.codes is not None
        fields[4 + plane] = sections.add(pack_plane(weight.codes.int() >> (2 * plane) & 3))
    fields[6], fields[7] = weight.zero, weight.step
    fields[8] = sections.add(weight.steps)
    fields[11] = blocks
    if weight.escapes:
        cells = sorted(
            (row * blocks + column // BLOCK, column % BLOCK, extra)
            for row, column, extra in weight.escapes
        )
        counts = torch.zeros(coded_rows * blocks + 1, dtype=torch.int32)
        for cell, _, _ in cells:
            counts[cell + 1] += 1
        fields[9] = sections.add(counts.cumsum(0).to(torch.int32))
        packed = [column | (extra + 8) << 12 for _, column, extra in cells]
        fields[10] = sections.add(torch.tensor(packed, dtype=torch.int32).to(torch.int16))
    if weight.coded is not None:
        fields[12] = sections.add(_row_map(weight.coded))
    if weight.channels is not None:
        fields[13] = len(weight.channels)
        fields[14] = sections.add(weight.channels.to(torch.int32))
        fields[15] = sections.add(weight.values)
    if weight.right is not None:
        fields[16] = len(weight.right)
        kinds = {torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
        fields[17] = kinds[weight.right.dtype]
        fields[18], fields[19] = sections.add(weight.right), sections.add(weight.left)
        fields[20], fields[21] = sections.add(weight.right_steps), sections.add(weight.left_steps)
    fields[22] = sections.add(weight.vector)
    return fields


def _row_map(coded: torch.Tensor) -> torch.Tensor:
    words, rank = [], 0
    for start in range(0, len(coded), 32):
        bits = sum(1 << i for i, bit in enumerate(coded[start : start + 32].tolist()) if bit)
        words.append([bits - (bits >> 31 << 32), rank])
        rank += bits.bit_count()
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def slots_of(images: list[torch.Tensor | None]) -> torch.Tensor:
    """Slots with these images, uint8 [S, bytes], the first byte at a multiple of 64."""
    size = max((len(image) for image in images if image is not None), default=256)
    room = torch.zeros(len(images) * size + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    slots = room[start : start + len(images) * size].view(len(images), size)
    for slot, image in zip(slots, images, strict=True):
        if image is not None:
            slot[: len(image)] = image
    return slots
