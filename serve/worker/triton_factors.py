"""Factors of slots: h = x Aᵀ, then y += h Bᵀ; launched where an engine allows a rank above nought.

Shapes: G groups, M places of a group, K columns, N rows of a slice, r rank.
"""

import torch
import triton
import triton.language as tl

from deltamux.serve.worker.triton_dense import factor_element
from deltamux.serve.worker.triton_image import (
    GROUP,
    RANK,
    group_of,
    record_of,
)
from deltamux.serve.worker.triton_kernel import slice_of

_WIDTH: tl.constexpr = tl.constexpr(GROUP)
# Ranks and columns that a step multiplies.
_RANKS: tl.constexpr = tl.constexpr(16)
_STEP: tl.constexpr = tl.constexpr(64)


@triton.jit(do_not_specialize=["entry0", "entry1", "entry2", "entry3", "most", "skipped"])
def right_kernel(
    h, x, x_stride, order, starts, slots, slot_bytes, entry0, entry1, entry2, entry3, most, skipped,
    K: tl.constexpr, SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr, SLICES: tl.constexpr,
    MOST_RANK: tl.constexpr,
):  # fmt: skip
    """h[g, m] = x Aᵀ; grid (steps of 16 ranks, slices, groups).

    Args:
        h: float32 [G, SLICES, MOST_RANK, M].
        skipped: Groups in front of the first.
    """
    rank = tl.program_id(0) * _RANKS
    part = tl.program_id(1)
    group = tl.program_id(2)
    entry = entry0
    entry = tl.where(part == 1, entry1, entry)
    entry = tl.where(part == 2, entry2, entry)
    entry = tl.where(part == 3, entry3, entry)
    slot, first, count = group_of(starts, group + skipped, most, SLOTS, SLOTS_WIDTH, _WIDTH)
    if count == 0:
        return
    image, record = record_of(slots, slot_bytes, slot, entry)
    ranks = tl.load(record + RANK)
    if rank >= ranks:
        return
    r_R, m_M = rank + tl.arange(0, _RANKS), tl.arange(0, _WIDTH)
    row_M = tl.load(order + first + m_M, mask=m_M < count, other=0).to(tl.int64)
    h_RM = tl.zeros([_RANKS, _WIDTH], tl.float32)
    for k in tl.range(0, K, _STEP):
        k_K = k + tl.arange(0, _STEP)
        at = r_R[:, None].to(tl.int64) * K + k_K[None, :]
        mask = (r_R < ranks)[:, None] & (k_K < K)[None, :]
        a_RK = factor_element(image, record, 0, at, r_R[:, None] + at * 0, mask)
        inside = (k_K < K)[:, None] & (m_M < count)[None, :]
        x_KM = tl.load(x + row_M[None, :] * x_stride + k_K[:, None], mask=inside, other=0.0)
        h_RM = tl.dot(a_RK, x_KM.to(tl.float32), h_RM, input_precision="ieee")
    at = ((group.to(tl.int64) * SLICES + part) * MOST_RANK + r_R[:, None]) * _WIDTH + m_M[None, :]
    tl.store(h + at, h_RM)


@triton.jit(do_not_specialize=["entry0", "entry1", "entry2", "entry3", "most", "skipped"])
def left_kernel(
    y, y_stride, h, order, starts, slots, slot_bytes, entry0, entry1, entry2, entry3, most, skipped,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, BN: tl.constexpr,
    SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr, SLICES: tl.constexpr, MOST_RANK: tl.constexpr,
):  # fmt: skip
    """y += h Bᵀ; grid (tiles of all slices, groups)."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    entry, start, rows, column, part = slice_of(
        tile, entry0, entry1, entry2, entry3, N0, N1, N2, N3, BN
    )
    slot, first, count = group_of(starts, group + skipped, most, SLOTS, SLOTS_WIDTH, _WIDTH)
    if count == 0:
        return
    image, record = record_of(slots, slot_bytes, slot, entry)
    ranks = tl.load(record + RANK)
    if ranks == 0:
        return
    n_N, m_M = start + tl.arange(0, BN), tl.arange(0, _WIDTH)
    delta_NM = tl.zeros([BN, _WIDTH], tl.float32)
    base = (group.to(tl.int64) * SLICES + part) * MOST_RANK
    for r in tl.range(0, ranks, _RANKS):
        r_R = r + tl.arange(0, _RANKS)
        at = n_N[:, None].to(tl.int64) * ranks + r_R[None, :]
        mask = (n_N < rows)[:, None] & (r_R < ranks)[None, :]
        b_NR = factor_element(image, record, 1, at, n_N[:, None] + at * 0, mask)
        h_at = h + (base + r_R[:, None]) * _WIDTH + m_M[None, :]
        h_RM = tl.load(h_at, mask=(r_R < ranks)[:, None], other=0.0)
        delta_NM = tl.dot(b_NR, h_RM, delta_NM, input_precision="ieee")
    row_M = tl.load(order + first + m_M, mask=m_M < count, other=0).to(tl.int64)
    at_NM = y + row_M[None, :] * y_stride + column + n_N[:, None]
    inside = (n_N < rows)[:, None] & (m_M < count)[None, :]
    y_NM = tl.load(at_NM, mask=inside, other=0.0).to(tl.float32) + delta_NM
    tl.store(at_NM, y_NM.to(y.dtype.element_ty), mask=inside)


def launch_factors(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    records: tuple[int, ...],
    sizes: tuple[int, ...],
    rank: int,
    groups: tuple[int, int, int],
) -> None:
    """y[rows of s] += x Aᵀ Bᵀ; y is rounded once more where a record has factors.

    Args:
        y_TN: Output, last stride 1, written in place.
        x_TK: Input, last stride 1.
        order: Rows of the batch by slot.
        starts: Where each slot's begin.
        slots: uint8 [S, bytes of a slot].
        records: Record of each slice, four.
        sizes: Rows of each slice, four.
        rank: The largest that a record may have.
        groups: Groups of the launch, groups in front of them, most rows of a slot.
    """
    count, skipped, most = groups
    slices = sum(size > 0 for size in sizes)
    padded = -(-rank // 16) * 16
    width = triton.next_power_of_2(slots.shape[0])
    h = torch.empty(count, slices, padded, GROUP, dtype=torch.float32, device=x_TK.device)
    where = (order, starts, slots, slots.stride(0), *records, most, skipped)
    shared = {"SLOTS": slots.shape[0], "SLOTS_WIDTH": width, "SLICES": slices, "MOST_RANK": padded}
    right_kernel[(padded // 16, slices, count)](
        h, x_TK, x_TK.stride(0), *where, K=x_TK.shape[1], **shared
    )
    tiles = sum(-(-size // 64) for size in sizes)
    left_kernel[(tiles, count)](y_TN, y_TN.stride(0), h, *where, *sizes, BN=64, **shared)
