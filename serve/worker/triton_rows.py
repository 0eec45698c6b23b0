"""Embedding rows and norms of slots: one program for each row of the batch.

Shapes: T rows, H hidden channels.
"""

import torch
import triton
import triton.language as tl

from deltamux.serve.worker.triton_dense import level_of, low_rank
from deltamux.serve.worker.triton_image import (
    BLOCK,
    CHANNEL_INDEX,
    CHANNEL_VALUES,
    CHANNELS,
    ESCAPES,
    PLANES,
    RANK,
    VECTOR,
    ZERO,
    coded_row,
    number,
    record_of,
    section,
    steps_of,
)
from deltamux.serve.worker.triton_rest import escape_table


@triton.jit
def _row_escapes(image, record, row_1, k_K, K: tl.constexpr):
    """Sum of the escapes at each column of one row, float32 [1, K]."""
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    sum_K = tl.zeros_like(k_K)
    starts, escapes, present = escape_table(image, record)
    row = tl.max(row_1, 0)
    if present:
        for block in tl.static_range(blocks):
            begin = tl.load(starts + row * blocks + block)
            end = tl.load(starts + row * blocks + block + 1)
            for e in tl.range(begin, end):
                entry = tl.load(escapes + e).to(tl.int32) & 0xFFFF
                at = (entry & 4095) + block * BLOCK
                sum_K += tl.where(k_K == at, (entry >> 12) - 8, 0)
    return sum_K.to(tl.float32)[None, :]


@triton.jit
def _row_channels(image, record, n_1, known_1, k_K):
    """The 16-bit channels' values at each column of one row, float32 [1, K]."""
    sum_1K = tl.zeros_like(k_K)[None, :].to(tl.float32)
    count = tl.load(record + CHANNELS)
    index = section(image, record, CHANNEL_INDEX, tl.int32)
    values = section(image, record, CHANNEL_VALUES, tl.bfloat16)
    for c in tl.range(0, count):
        value_1 = tl.load(values + n_1.to(tl.int64) * count + c, mask=known_1, other=0.0)
        here_K = k_K == tl.load(index + c)
        sum_1K += tl.where(here_K[None, :], value_1[:, None].to(tl.float32), 0.0)
    return sum_1K


@triton.jit(do_not_specialize=["entry", "rows"])
def embedding_kernel(
    y, y_stride, ids, slot_of_row, slots, slot_bytes, entry, rows,
    K: tl.constexpr, BK: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """y[t] += Δ̂_s[ids[t]]; grid (rows of the batch, chunks of columns)."""
    stride: tl.constexpr = (K + 63) // 64 * 16
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_of_row + t).to(tl.int32)
    if slot < 0:
        return
    image, record = record_of(slots, slot_bytes, slot, entry)
    present = tl.load(record + PLANES) | tl.load(record + ESCAPES) | tl.load(record + CHANNELS)
    if (present | tl.load(record + RANK)) == 0:
        return
    n_1 = tl.load(ids + t).to(tl.int32) + tl.zeros([1], tl.int32)
    row_1, known_1 = coded_row(image, record, n_1, rows, MAPPED)
    k_K = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (k_K < K)[None, :] & known_1[:, None]
    planes, zero = tl.load(record + PLANES), number(record, ZERO)
    level = level_of(
        image, record, planes, zero, row_1[:, None], k_K[None, :], stride, mask
    )  # fmt: skip
    level += _row_escapes(image, record, row_1, k_K, K)
    delta = level * steps_of(image, record, row_1)[:, None]
    delta += low_rank(image, record, n_1, known_1, k_K, k_K < K, K)
    delta += _row_channels(image, record, n_1, known_1, k_K)
    at = y + t * y_stride + k_K[None, :]
    y_1K = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (y_1K.to(tl.float32) + delta).to(y_1K.dtype), mask=mask)


@triton.jit(do_not_specialize=["entry", "inner"])
def norm_kernel(
    y, y_stride, x, x_stride, slot_of_row, slots, slot_bytes, entry, inner, epsilon,
    H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """y[r] = RMSNorm(x[r]) with the slot's own weight, where it has one; grid (rows of H)."""
    line = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_of_row + line // inner).to(tl.int32)
    if slot < 0:
        return
    image, record = record_of(slots, slot_bytes, slot, entry)
    if tl.load(record + VECTOR) == 0:
        return
    h_H = tl.arange(0, BH)
    weight = section(image, record, VECTOR, tl.float32)
    x_H = tl.load(x + line * x_stride + h_H, mask=h_H < H, other=0.0).to(tl.float32)
    w_H = tl.load(weight + h_H, mask=h_H < H, other=0.0)
    dtype: tl.constexpr = y.dtype.element_ty
    unit_H = x_H * tl.rsqrt(tl.sum(x_H * x_H, 0) / H + epsilon)
    value_H = unit_H.to(dtype).to(tl.float32) * w_H.to(dtype).to(tl.float32)
    tl.store(y + line * y_stride + h_H, value_H.to(dtype), mask=h_H < H)


def launch_embedding(
    y_TH: torch.Tensor,
    ids_T: torch.Tensor,
    slot_of_row: torch.Tensor,
    slots: torch.Tensor,
    entry: int,
    rows: int,
    row_map: bool = True,
) -> None:
    """y[t] += Δ̂_s[ids[t]]; ids from `rows` on add nothing.

    Args:
        y_TH: The base's embeddings, last stride 1, written in place.
        ids_T: Token ids, int32 or int64.
        slot_of_row: Slot of each row, −1: the base.
        slots: uint8 [S, bytes of a slot].
        entry: The table's record.
        rows: Rows of the table.
        row_map: Whether the record may lack rows.
    """
    count, columns = y_TH.shape
    if count == 0:
        return
    chunk = min(1024, triton.next_power_of_2(columns))
    embedding_kernel[(count, -(-columns // chunk))](
        y_TH, y_TH.stride(0), ids_T, slot_of_row, slots, slots.stride(0), entry, rows,
        K=columns, BK=chunk, MAPPED=row_map, num_warps=4,
    )  # fmt: skip


def launch_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    slots: torch.Tensor,
    entry: int,
    epsilon: float,
) -> None:
    """y[t] = RMSNorm(x[t]) with the slot's own weight, where the slot has one.

    Args:
        y: The base's normalized output [T, ..., H], contiguous, written in place.
        x: What was normalized: same shape, last stride 1.
        slot_of_row: Slot of each row, −1: the base.
        slots: uint8 [S, bytes of a slot].
        entry: The norm's record.
        epsilon: Added to the mean square.
    """
    hidden = y.shape[-1]
    y_LH, x_LH = y.view(-1, hidden), x.reshape(-1, hidden)
    lines = y_LH.shape[0]
    if lines == 0:
        return
    norm_kernel[(lines,)](
        y_LH, y_LH.stride(0), x_LH, x_LH.stride(0), slot_of_row, slots, slots.stride(0), entry,
        lines // y.shape[0], epsilon, H=hidden, BH=triton.next_power_of_2(hidden),
        num_warps=8 if hidden > 512 else 1,
    )  # fmt: skip
