"""The product with slots' deltas in plain torch: what the compiled kernel computes, without rounding.

It reads the same slot images (`compression/image/layout.py` has their fields), turns one slice of one
slot at a time into float32 and multiplies: the kernel's reference in tests, and the path of machines
that have no compiled one.

Shapes: T rows of the batch, S slots, N outputs and K inputs of a slice, R rows that have codes,
C 16-bit channels, r the rank of factors, E escapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltamux.compression.image.layout import (
    HEADER_BYTES,
    RECORD_BYTES,
    UNIT,
    FactorKind,
    Field,
)
from deltamux.compression.image.planes import BLOCK_COLUMNS, ESCAPE_BITS

MIDDLE_OF_ESCAPES = 8
FACTOR_TYPES = {
    FactorKind.BFLOAT16: torch.bfloat16,
    FactorKind.FLOAT32: torch.float32,
    FactorKind.CODED: torch.int8,
}


@dataclass(frozen=True)
class SlotRecord:
    """The record of one weight in one slot, which may be empty: then all of its fields are nought.

    Args:
        image: uint8 [bytes] of one slot.
        entry: Index of the record.
    """

    image: torch.Tensor
    entry: int

    def _bytes(self, field: Field) -> torch.Tensor:
        start = HEADER_BYTES + RECORD_BYTES * self.entry + 4 * field
        return self.image[start : start + 4]

    def number(self, field: Field) -> int:
        """A field as an integer."""
        return int(self._bytes(field).view(torch.int32))

    def real(self, field: Field) -> float:
        """A field as a number with a point."""
        return float(self._bytes(field).view(torch.float32))

    def section(self, field: Field, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """What the offset in a field points at."""
        start = (self.number(field) & 0xFFFFFFFF) * UNIT
        size = dtype.itemsize
        for each in shape:
            size *= each
        return self.image[start : start + size].view(dtype).view(shape)


def add_linear(
    slots: torch.Tensor,
    entries: Sequence[int],
    slice_rows: Sequence[int],
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """y[rows of s] += x Δ̂_sᵀ + bias_s, in place, in float32 and rounded once.

    Args:
        slots: uint8 [S, bytes], images of experts.
        entries: The record of each slice of the linear.
        slice_rows: Outputs of each slice.
        y_TN: Output of the base.
        x_TK: Input.
        order: Rows by slot, see `rows.py`.
        starts: Spans in `order`.
    """
    spans = starts.tolist()
    for slot in range(len(slots)):
        rows = order[spans[slot] : spans[slot + 1]]
        if len(rows) == 0:
            continue
        x = x_TK.index_select(0, rows).float()
        start = 0
        for entry, outputs in zip(entries, slice_rows, strict=True):
            outputs_of_slice = slice(start, start + outputs)
            start += outputs
            record = SlotRecord(slots[slot], entry)
            added = x @ dense(record, outputs, x.shape[1]).T
            if record.number(Field.VECTOR):
                added += record.section(Field.VECTOR, torch.float32, outputs)
            part = y_TN[rows, outputs_of_slice].float() + added
            y_TN[rows, outputs_of_slice] = part.to(y_TN.dtype)


def add_embedding(
    slots: torch.Tensor,
    entry: int,
    rows: int,
    y_TK: torch.Tensor,
    ids_T: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """y[t] += Δ̂_s[ids[t]] for the rows of slots, in place; ids from `rows` on add nothing.

    Args:
        slots: uint8 [S, bytes], images of experts.
        entry: The record of the embedding.
        rows: V, rows of the table.
        y_TK: The base's embeddings.
        ids_T: Token ids.
        order: Rows by slot, see `rows.py`.
        starts: Spans in `order`.
    """
    spans = starts.tolist()
    for slot in range(len(slots)):
        members = order[spans[slot] : spans[slot + 1]]
        members = members[ids_T[members] < rows]
        if len(members) == 0:
            continue
        delta = dense(SlotRecord(slots[slot], entry), rows, y_TK.shape[1], ids_T[members].long())
        y_TK[members] = (y_TK[members].float() + delta).to(y_TK.dtype)


def rms_norm(
    x: torch.Tensor, weight_H: torch.Tensor, epsilon: float, dtype: torch.dtype
) -> torch.Tensor:
    """RMSNorm(x) over the last dimension, in `dtype` (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return unit.to(dtype) * weight_H.to(dtype)


def dense(
    record: SlotRecord, rows: int, columns: int, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Δ̂ of some rows, or of all, as float32 [wanted, columns].

    Args:
        record: The weight's.
        rows: N.
        columns: K.
        wanted: int64 rows; None: all.
    """
    if wanted is None:
        wanted = torch.arange(rows)
    delta = torch.zeros(len(wanted), columns)
    if record.number(Field.PLANES) or record.number(Field.ESCAPES):
        coded_rows, found = _coded_rows(record, rows, wanted)
        delta[found] = _coded(record, columns, coded_rows)
    if channels := record.number(Field.CHANNELS):
        index = record.section(Field.CHANNEL_INDEX, torch.int32, channels).long()
        values = record.section(Field.CHANNEL_VALUES, torch.bfloat16, rows, channels)
        delta[:, index] += values[wanted].float()
    if rank := record.number(Field.RANK):
        dtype = FACTOR_TYPES[FactorKind(record.number(Field.FACTOR_KIND))]
        right = record.section(Field.RIGHT, dtype, rank, columns).float()
        left = record.section(Field.LEFT, dtype, rows, rank)[wanted].float()
        if dtype is torch.int8:
            right *= record.section(Field.RIGHT_STEPS, torch.float32, rank).unsqueeze(1)
            left *= record.section(Field.LEFT_STEPS, torch.float32, rows)[wanted].unsqueeze(1)
        delta += left @ right
    return delta


def _coded_rows(
    record: SlotRecord, rows: int, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the planes for those of the wanted rows that have some, and which these are."""
    if not record.number(Field.ROW_MAP):
        return wanted, torch.arange(len(wanted))
    words = record.section(Field.ROW_MAP, torch.int32, -(-rows // 32), 2)[:, 0]
    bits = (words.unsqueeze(1) >> torch.arange(32)) & 1
    coded = bits.view(-1)[:rows].bool()
    found = coded[wanted].nonzero().squeeze(1)
    return coded.cumsum(0)[wanted[found]] - 1, found


def _coded(record: SlotRecord, columns: int, rows_R: torch.Tensor) -> torch.Tensor:
    """Steps times codes and escapes of some rows of the planes."""
    levels = torch.zeros(len(rows_R), columns)
    all_rows = record.number(Field.ROWS)
    planes, stride = record.number(Field.PLANES), record.number(Field.STRIDE)
    for plane in range(planes):
        packed = record.section(Field(Field.PLANE0 + plane), torch.uint8, all_rows, stride)[rows_R]
        codes = (packed.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3
        levels += codes.view(len(rows_R), -1)[:, :columns].float() * 4**plane
    if planes:
        levels -= record.real(Field.ZERO)
    if record.number(Field.ESCAPES):
        _add_escapes(record, levels, rows_R)
    if record.number(Field.STEPS):
        steps = record.section(Field.STEPS, torch.bfloat16, all_rows)[rows_R].float()
        return levels * steps.unsqueeze(1)
    return levels * record.real(Field.STEP)


def _add_escapes(record: SlotRecord, levels: torch.Tensor, rows_R: torch.Tensor) -> None:
    blocks, all_rows = record.number(Field.BLOCKS), record.number(Field.ROWS)
    starts = record.section(Field.STARTS, torch.int32, all_rows * blocks + 1).long()
    counts = starts.diff().view(all_rows, blocks)
    escapes = record.section(Field.ESCAPES, torch.int16, int(starts[-1])).int() & 0xFFFF
    place = torch.arange(all_rows * blocks).repeat_interleave(counts.view(-1))
    column = (place % blocks) * BLOCK_COLUMNS + (escapes & (BLOCK_COLUMNS - 1))
    extra = ((escapes >> ESCAPE_BITS) - MIDDLE_OF_ESCAPES).float()
    whole = torch.zeros(all_rows, levels.shape[1])
    whole.index_put_((place // blocks, column), extra, accumulate=True)
    levels += whole[rows_R]
