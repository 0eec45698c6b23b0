"""A record's delta as a dense matrix, with the base's weight added if wanted: for prefill and checks.

Each weight is rounded once, after base, code, escapes and factors have been added in float32 (a
16-bit channel is added to the rounded weight). Needs the escapes of a (row, block) in ascending
order of their columns.

Shapes: N rows of a tile, K columns of a chunk, r rank.
"""

import torch
import triton
import triton.language as tl

from deltamux.compression.image.planes import BLOCK_COLUMNS
from deltamux.serve.worker.triton_image import (
    BLOCK,
    CHANNEL_INDEX,
    CHANNEL_VALUES,
    CHANNELS,
    FACTOR_KIND,
    PLANE0,
    PLANE1,
    PLANES,
    RANK,
    RIGHT,
    RIGHT_STEPS,
    ZERO,
    coded_row,
    number,
    record_of,
    section,
    steps_of,
    vector_of,
)
from deltamux.serve.worker.triton_rest import escape_spans, escape_table


@triton.jit
def level_of(image, record, planes, zero, row, column, STRIDE: tl.constexpr, mask):
    """Code minus zero at (row, column), float32; nought without planes."""
    at = row.to(tl.int64) * STRIDE + column // 4
    shift = column % 4 * 2
    level = tl.zeros_like(at).to(tl.float32)
    if planes > 0:
        plane = section(image, record, PLANE0, tl.uint8)
        code = (
            tl.load(tl.max_contiguous(plane + at, (1, 2)), mask=mask, other=0).to(tl.int32) >> shift
        ) & 3
        level += code.to(tl.float32) - zero
    if planes > 1:
        plane = section(image, record, PLANE1, tl.uint8)
        code = (
            tl.load(tl.max_contiguous(plane + at, (1, 2)), mask=mask, other=0).to(tl.int32) >> shift
        ) & 3
        level += 4.0 * code.to(tl.float32)
    return level


@triton.jit
def _codes(plane, row_N, k, STRIDE: tl.constexpr, BK: tl.constexpr):
    """Codes of BK columns from `k` on, float32 [N, K]; eight of them are two bytes of one lane."""
    half: tl.constexpr = STRIDE // 2
    h_H = k // 8 + tl.arange(0, BK // 8)
    at_NH = plane.to(tl.pointer_type(tl.int16)) + row_N[:, None].to(tl.int64) * half + h_H[None, :]
    pair_NH = tl.load(at_NH, mask=(h_H < half)[None, :], other=0).to(tl.int32)
    code_NH8 = (pair_NH[:, :, None] >> (2 * tl.arange(0, 8))[None, None, :]) & 3
    # 2^23 + code, less 2^23: cheaper than a conversion.
    number_NH8 = (code_NH8 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return tl.reshape(number_NH8, (row_N.shape[0], BK))


@triton.jit
def _factor(image, record, KIND: tl.constexpr, SIDE: tl.constexpr, at, line, mask):
    """Elements `at` of a factor, float32; `line`: which step of kind 3 they have."""
    address = section(image, record, RIGHT + SIDE, tl.int8)
    if KIND == 1:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0.0)
    elif KIND == 2:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    else:
        step = tl.load(
            section(image, record, RIGHT_STEPS + SIDE, tl.float32) + line, mask=mask, other=0.0
        )
        level = tl.load(address + at, mask=mask, other=0)
        value = level.to(tl.float32) * step
    return value.to(tl.float32)


@triton.jit
def factor_element(image, record, SIDE: tl.constexpr, at, line, mask):
    """As `_factor`, of the kind that the record names. SIDE 0: A [r, K]; 1: B [N, r]."""
    kind = tl.load(record + FACTOR_KIND)
    value = tl.zeros_like(at).to(tl.float32)
    if kind == 1:
        value = _factor(image, record, 1, SIDE, at, line, mask)
    elif kind == 2:
        value = _factor(image, record, 2, SIDE, at, line, mask)
    elif kind == 3:
        value = _factor(image, record, 3, SIDE, at, line, mask)
    return value


@triton.jit
def low_rank(image, record, n_N, known_N, k_K, inside_K, K: tl.constexpr):
    """(B A) at rows `n_N` and columns `k_K`, float32."""
    rank = tl.load(record + RANK)
    sum_NK = tl.zeros_like(n_N)[:, None].to(tl.float32) + tl.zeros_like(k_K)[None, :]
    for r in tl.range(0, rank):
        line = tl.zeros_like(k_K) + r
        a_K = factor_element(image, record, 0, line.to(tl.int64) * K + k_K, line, inside_K)
        b_N = factor_element(image, record, 1, n_N.to(tl.int64) * rank + r, n_N, known_N)
        sum_NK += b_N[:, None] * a_K[None, :]
    return sum_NK


@triton.jit
def _entry_at(escapes, place, inside):
    """Escapes [N, E], nought outside; lanes along the row."""
    at = tl.max_contiguous(escapes + place, (1, 2))
    return tl.load(at, mask=inside, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def _first_of_columns(escapes, entry, place, begin_N, end_N):
    """Whether escapes are their column's first [N, E], and the sum of all of the column."""
    inside = place < end_N[:, None]
    prior = inside & (place > begin_N[:, None])
    before = _entry_at(escapes, place - 1, prior)
    first = inside & ~(prior & (((before ^ entry) & 4095) == 0))
    d = (entry >> 12) - 8
    step = 1
    same = first
    while step > 0:
        ahead = same & (place + step < end_N[:, None])
        after = _entry_at(escapes, place + step, ahead)
        same = ahead & (((after ^ entry) & 4095) == 0)
        d += tl.where(same, (after >> 12) - 8, 0)
        step = tl.where(tl.max(tl.max(same.to(tl.int32), 1), 0) > 0, step + 1, 0)
    return first, d


@triton.jit
def _write_escapes(
    out, base, image, record, n_N, row_N, begin_N, end_N, entry, block, K: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_RANK: tl.constexpr,
):  # fmt: skip
    """Weights that have escapes, once more, with them; the first escapes are given."""
    stride: tl.constexpr = (K + 63) // 64 * 16
    width: tl.constexpr = entry.shape[1]
    _, escapes, _ = escape_table(image, record)
    planes, zero = tl.load(record + PLANES), number(record, ZERO)
    step_N = steps_of(image, record, row_N)
    place = begin_N[:, None] + tl.arange(0, width)[None, :]
    for _ in tl.range(0, tl.max(end_N - begin_N, 0), width):
        column = (entry & 4095) + block * BLOCK
        first, d = _first_of_columns(escapes, entry, place, begin_N, end_N)
        level = level_of(image, record, planes, zero, row_N[:, None], column, stride, first)
        value = (level + d.to(tl.float32)) * step_N[:, None]
        at = n_N[:, None].to(tl.int64) * K + column
        if HAS_BASE:
            base_at = tl.max_contiguous(base + at, (1, 2))
            value += tl.load(base_at, mask=first, other=0.0).to(tl.float32)
        if HAS_RANK:
            value += _rank_at(image, record, n_N, column, first, K)
        out_at = tl.max_contiguous(out + at, (1, 2))
        tl.store(out_at, value.to(out.dtype.element_ty), mask=first)
        place += width
        entry = _entry_at(escapes, place, place < end_N[:, None])


@triton.jit
def _rank_at(image, record, n_N, column, mask, K: tl.constexpr):
    """(B A) at single places [N, E], float32."""
    rank = tl.load(record + RANK)
    value = tl.zeros_like(column).to(tl.float32)
    n = n_N[:, None] + tl.zeros_like(column)
    for r in tl.range(0, rank):
        line = tl.zeros_like(column) + r
        a = factor_element(image, record, 0, line.to(tl.int64) * K + column, line, mask)
        value += a * factor_element(image, record, 1, n.to(tl.int64) * rank + r, n, mask)
    return value


@triton.jit
def _levels(image, record, planes, zero, row_N, k, K: tl.constexpr, BK: tl.constexpr):
    """Codes of BK columns from k on, float32 [N, BK], nought at the record's zero."""
    stride: tl.constexpr = (K + 63) // 64 * 16
    level = _codes(section(image, record, PLANE0, tl.uint8), row_N, k, stride, BK) - zero
    if planes > 1:
        plane = section(image, record, PLANE1, tl.uint8)
        level += 4.0 * _codes(plane, row_N, k, stride, BK)
    return level


@triton.jit
def _add_vector(out, base, image, record, n_N, known_N):
    """out = base + the record's vector, at rows."""
    vector_N = vector_of(image, record, n_N, known_N)
    vector_N += tl.load(base + n_N, mask=known_N, other=0.0).to(tl.float32)
    tl.store(out + n_N, vector_N.to(out.dtype.element_ty), mask=known_N)


@triton.jit(do_not_specialize=["slot", "entry", "rows"])
def dense_kernel(
    out, base, bias_out, bias, slots, slot_bytes, slot, entry, rows,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr, MAPPED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANK: tl.constexpr,
):  # fmt: skip
    """out = base + Δ̂ [rows, K], bias_out = bias + vector [rows]; grid (row tiles, blocks)."""
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    block = tl.program_id(1)
    image, record = record_of(slots, slot_bytes, slot, entry)
    n_N = tl.program_id(0) * BN + tl.arange(0, BN)
    row_N, known_N = coded_row(image, record, n_N, rows, MAPPED)
    step_N = tl.where(known_N, steps_of(image, record, row_N), 0.0)
    planes, zero = tl.load(record + PLANES), number(record, ZERO)
    # What the weights with escapes need is on its way while the others are made.
    starts, escapes, present = escape_table(image, record)
    begin_N, end_N = escape_spans(starts + block, row_N * blocks, known_N, present, 1)
    place = begin_N[:, None] + tl.arange(0, WIDTH)[None, :]
    first_entry = _entry_at(escapes, place, place < end_N[:, None])
    for k in tl.range(block * BLOCK, min(K, block * BLOCK + BLOCK), BK):
        k_K = k + tl.arange(0, BK)
        mask = (n_N < rows)[:, None] & (k_K < K)[None, :]
        at = n_N[:, None].to(tl.int64) * K + k_K[None, :]
        value = tl.zeros([BN, BK], tl.float32)
        if HAS_BASE:
            value += tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
        if planes > 0:
            value += _levels(image, record, planes, zero, row_N, k, K, BK) * step_N[:, None]
        if HAS_RANK:
            value += low_rank(image, record, n_N, known_N, k_K, k_K < K, K)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    _write_escapes(
        out, base, image, record, n_N, row_N, begin_N, end_N, first_entry, block, K, HAS_BASE,
        HAS_RANK,
    )  # fmt: skip
    tl.debug_barrier()
    _add_channels(out, image, record, n_N, n_N < rows, block, K)
    if HAS_BIAS and block == 0:
        _add_vector(bias_out, bias, image, record, n_N, n_N < rows)


@triton.jit
def _add_channels(out, image, record, n_N, known_N, block, K: tl.constexpr):
    """Add the 16-bit channels that lie in a block of columns."""
    count = tl.load(record + CHANNELS)
    index = section(image, record, CHANNEL_INDEX, tl.int32)
    values = section(image, record, CHANNEL_VALUES, tl.bfloat16)
    for c in tl.range(0, count):
        channel = tl.load(index + c)
        if channel // BLOCK == block:
            at = out + n_N.to(tl.int64) * K + channel
            value_N = tl.load(values + n_N.to(tl.int64) * count + c, mask=known_N, other=0.0)
            sum_N = tl.load(at, mask=known_N, other=0.0).to(tl.float32) + value_N.to(tl.float32)
            tl.store(at, sum_N.to(out.dtype.element_ty), mask=known_N)


def launch_dense(
    out_NK: torch.Tensor,
    slots: torch.Tensor,
    slot: int,
    entry: int,
    base_NK: torch.Tensor | None = None,
    bias: tuple[torch.Tensor, torch.Tensor] | None = None,
    row_map: bool = False,
    rank: bool = True,
) -> None:
    """out = base + Δ̂ of one record.

    Args:
        out_NK: Written, contiguous.
        slots: uint8 [S, bytes of a slot].
        slot: Whose delta.
        entry: Which record.
        base_NK: Added, contiguous; None: nothing.
        bias: Written and base's bias [N]: written = base's + the record's vector.
        row_map: Whether the record may lack rows.
        rank: Whether the record may have factors.
    """
    rows, columns = out_NK.shape
    tile = 4
    grid = (-(-rows // tile), -(-columns // BLOCK_COLUMNS))
    written, given = (out_NK, out_NK) if bias is None else bias
    dense_kernel[grid](
        out_NK, out_NK if base_NK is None else base_NK, written, given, slots, slots.stride(0),
        slot, entry, rows, K=columns, BN=tile, BK=1024, WIDTH=32, MAPPED=row_map,
        HAS_BASE=base_NK is not None, HAS_BIAS=bias is not None, HAS_RANK=rank,
        num_warps=4,
    )  # fmt: skip
