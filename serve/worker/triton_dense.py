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
from deltamux.serve.worker.triton_rest import escape_table


@triton.jit
def level_of(image, record, planes, zero, row, column, STRIDE: tl.constexpr, mask):
    """Code minus zero at (row, column), float32; nought without planes."""
    at = row.to(tl.int64) * STRIDE + column // 4
    shift = column % 4 * 2
    level = tl.zeros_like(at).to(tl.float32)
    if planes > 0:
        plane = section(image, record, PLANE0, tl.uint8)
        code = (tl.load(plane + at, mask=mask, other=0).to(tl.int32) >> shift) & 3
        level += code.to(tl.float32) - zero
    if planes > 1:
        plane = section(image, record, PLANE1, tl.uint8)
        code = (tl.load(plane + at, mask=mask, other=0).to(tl.int32) >> shift) & 3
        level += 4.0 * code.to(tl.float32)
    return level


@triton.jit
def _codes(plane, row_N, b_B, STRIDE: tl.constexpr):
    """The codes of bytes `b_B` of rows, four of each byte: float32 [N, 4 B]."""
    at = plane + row_N[:, None].to(tl.int64) * STRIDE + b_B[None, :]
    bytes = tl.load(at, mask=(b_B < STRIDE)[None, :], other=0).to(tl.int32)
    even = tl.interleave(bytes & 3, (bytes >> 4) & 3)
    odd = tl.interleave((bytes >> 2) & 3, (bytes >> 6) & 3)
    return tl.interleave(even, odd).to(tl.float32)


@triton.jit
def _levels(image, record, row_N, b_B, STRIDE: tl.constexpr):
    """Codes minus zero of bytes `b_B` of rows, float32 [N, 4 B]; nought without planes."""
    planes = tl.load(record + PLANES)
    level = tl.zeros([row_N.shape[0], 4 * b_B.shape[0]], tl.float32)
    if planes > 0:
        plane = section(image, record, PLANE0, tl.uint8)
        level = _codes(plane, row_N, b_B, STRIDE) - number(record, ZERO)
    if planes > 1:
        level += 4.0 * _codes(section(image, record, PLANE1, tl.uint8), row_N, b_B, STRIDE)
    return level


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
def _write_escapes(
    out, base, image, record, n_N, row_N, known_N, block, K: tl.constexpr, HAS_BASE: tl.constexpr
):
    """Weights that have escapes, once more, with them: the first escape of a column writes all."""
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    stride: tl.constexpr = (K + 63) // 64 * 16
    starts, escapes, present = escape_table(image, record)
    planes, zero = tl.load(record + PLANES), number(record, ZERO)
    step_N = steps_of(image, record, row_N)
    if present:
        begin_N = tl.load(starts + row_N * blocks + block)
        end_N = tl.load(starts + row_N * blocks + block + 1)
        end_N = tl.where(known_N, end_N, begin_N)
        for e in tl.range(0, tl.max(end_N - begin_N, 0), 32):
            place = begin_N[:, None] + (e + tl.arange(0, 32))[None, :]
            inside = place < end_N[:, None]
            entry = tl.load(escapes + place, mask=inside, other=0).to(tl.int32) & 0xFFFF
            column = (entry & 4095) + block * BLOCK
            prior = inside & (place > begin_N[:, None])
            before = tl.load(escapes + place - 1, mask=prior, other=0).to(tl.int32)
            first = inside & ~(prior & (((before ^ entry) & 4095) == 0))
            d = (entry >> 12) - 8
            step, same = 1, first
            while tl.max(tl.max(same.to(tl.int32), 1), 0) > 0:
                ahead = same & (place + step < end_N[:, None])
                after = tl.load(escapes + place + step, mask=ahead, other=0).to(tl.int32) & 0xFFFF
                same = ahead & (((after ^ entry) & 4095) == 0)
                d += tl.where(same, (after >> 12) - 8, 0)
                step += 1
            level = level_of(image, record, planes, zero, row_N[:, None], column, stride, first)
            value = (level + d.to(tl.float32)) * step_N[:, None]
            at = n_N[:, None].to(tl.int64) * K + column
            if HAS_BASE:
                value += tl.load(base + at, mask=first, other=0.0).to(tl.float32)
            value += _rank_at(image, record, n_N, column, first, K)
            tl.store(out + at, value.to(out.dtype.element_ty), mask=first)


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


@triton.jit(do_not_specialize=["slot", "entry", "rows"])
def dense_kernel(
    out, base, bias_out, bias, slots, slot_bytes, slot, entry, rows,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MAPPED: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out = base + Δ̂ [rows, K], bias_out = bias + vector [rows]; grid (row tiles, blocks)."""
    stride: tl.constexpr = (K + 63) // 64 * 16
    block = tl.program_id(1)
    image, record = record_of(slots, slot_bytes, slot, entry)
    n_N = tl.program_id(0) * BN + tl.arange(0, BN)
    row_N, known_N = coded_row(image, record, n_N, rows, MAPPED)
    step_N = tl.where(known_N, steps_of(image, record, row_N), 0.0)
    for k in tl.range(block * BLOCK, min(K, block * BLOCK + BLOCK), BK):
        k_K = k + tl.arange(0, BK)
        mask = (n_N < rows)[:, None] & (k_K < K)[None, :]
        value = _levels(image, record, row_N, k // 4 + tl.arange(0, BK // 4), stride)
        value *= step_N[:, None]
        value += low_rank(image, record, n_N, known_N, k_K, k_K < K, K)
        at = n_N[:, None].to(tl.int64) * K + k_K[None, :]
        if HAS_BASE:
            value += tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    _write_escapes(out, base, image, record, n_N, row_N, known_N, block, K, HAS_BASE)
    tl.debug_barrier()
    _add_channels(out, image, record, n_N, n_N < rows, block, K)
    if HAS_BIAS and block == 0:
        vector_N = vector_of(image, record, n_N, n_N < rows)
        vector_N += tl.load(bias + n_N, mask=n_N < rows, other=0.0).to(tl.float32)
        tl.store(bias_out + n_N, vector_N.to(bias_out.dtype.element_ty), mask=n_N < rows)


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
    """
    rows, columns = out_NK.shape
    tile = 4
    grid = (-(-rows // tile), -(-columns // BLOCK_COLUMNS))
    written, given = (out_NK, out_NK) if bias is None else bias
    dense_kernel[grid](
        out_NK, out_NK if base_NK is None else base_NK, written, given, slots, slots.stride(0),
        slot, entry, rows, K=columns, BN=tile, BK=1024, MAPPED=row_map,
        HAS_BASE=base_NK is not None, HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
