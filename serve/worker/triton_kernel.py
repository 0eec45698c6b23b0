"""The grouped product: one launch adds the deltas of all slots and slices of a layer to its output.

A program has a tile of rows of one slice and one group of the batch (rows of one slot). It reads
the slot's record, multiplies and adds its tile into y; programs without work return after one load.

Shapes: T rows of the batch, N rows of the tile, M rows of the group, K columns, S slots.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_codes import product_many, product_one
from deltamux.serve.worker.triton_image import (
    GROUP,
    coded_row,
    group_of,
    number,
    record_of,
    section,
    steps_of,
    vector_of,
)
from deltamux.serve.worker.triton_rest import (
    channels_many,
    channels_one,
    escapes_many,
    escapes_one,
)
from deltamux.serve.worker.triton_stage import CHUNK

_WIDTH: tl.constexpr = tl.constexpr(GROUP)
_CHUNK: tl.constexpr = tl.constexpr(CHUNK)


@triton.jit
def slice_of(
    tile, entry0, entry1, entry2, entry3, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    N3: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Entry, first row, rows and first column of y of the slice that a tile lies in."""
    tiles0: tl.constexpr = (N0 + BN - 1) // BN
    tiles1: tl.constexpr = tiles0 + (N1 + BN - 1) // BN
    tiles2: tl.constexpr = tiles1 + (N2 + BN - 1) // BN
    entry, start, rows, column = entry0, tile * BN, N0, 0
    if N1 > 0 and tile >= tiles0:
        entry, start, rows, column = entry1, (tile - tiles0) * BN, N1, N0
    if N2 > 0 and tile >= tiles1:
        entry, start, rows, column = entry2, (tile - tiles1) * BN, N2, N0 + N1
    if N3 > 0 and tile >= tiles2:
        entry, start, rows, column = entry3, (tile - tiles2) * BN, N3, N0 + N1 + N2
    return entry, start, rows, column


@triton.jit
def _tile_one(
    image, record, x, n_N, row_N, known_N, K: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    UNROLL: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The delta of one row of the batch, float32 [N]."""
    codes_N = tl.zeros([BN], tl.float32)
    planes = tl.load(record)
    zero = number(record, 6)
    for p in tl.range(0, planes):
        plane = image + tl.load(record + 4 + p).to(tl.int64) * 64
        value_N = product_one(
            plane, x, tl.where(p == 0, zero, 0.0), row_N, K, BN, BJ, UNROLL, SPLIT, STAGES, ASSEMBLY
        )
        codes_N += value_N * tl.where(p == 0, 1.0, 4.0)
    step_N = steps_of(image, record, row_N)
    bias_N = vector_of(image, record, n_N, known_N)
    codes_N += escapes_one(image, record, x, row_N, known_N, K, BN, WIDTH)
    rest_N = channels_one(image, record, x, n_N, known_N, BN)
    return codes_N * step_N + rest_N + bias_N


@triton.jit
def _tile_many(
    image, record, staged, sums, n_N, row_N, known_N, K: tl.constexpr, BN: tl.constexpr,
    BJ: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, ASSEMBLY: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The delta of a group, float32 [N, M]."""
    codes_NM = tl.zeros([BN, _WIDTH], tl.float32)
    planes = tl.load(record)
    zero = number(record, 6)
    for p in tl.range(0, planes):
        plane = image + tl.load(record + 4 + p).to(tl.int64) * 64
        value_NM, total_M = product_many(
            plane, staged, sums, row_N, K, BN, BJ, STAGES, ASSEMBLY, CHUNKS, CHUNK_WIDTH
        )
        if p == 0:
            codes_NM += value_NM - zero * total_M[None, :]
        else:
            codes_NM += 4.0 * value_NM
    step_N = steps_of(image, record, row_N)
    bias_N = vector_of(image, record, n_N, known_N)
    codes_NM += escapes_many(image, record, staged, row_N, known_N, K, BN, WIDTH)
    rest_NM = channels_many(image, record, staged, n_N, known_N, BN)
    return codes_NM * step_N[:, None] + rest_NM + bias_N[:, None]


@triton.jit
def _write(at, delta, mask, ADD: tl.constexpr):
    """Add a delta to what is at an address, or put it there."""
    if ADD:
        delta += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, delta.to(at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["entry0", "entry1", "entry2", "entry3"])
def product_kernel(
    y, y_stride, x, x_stride, staged, sums, order, starts, slots, slot_bytes,
    entry0, entry1, entry2, entry3,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr,
    SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_WIDTH: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, BJ_MANY: tl.constexpr,
    STAGES_MANY: tl.constexpr, WIDTH_MANY: tl.constexpr, MANY: tl.constexpr, ROW_MAP: tl.constexpr,
    ADD: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """y[rows of s] += x Δ̂_sᵀ + bias_s; grid (tiles of all slices, groups).

    Args:
        y: [T, N of all slices], written in place.
        staged: See `triton_stage.py`, like `sums`; read only where MANY.
        entry0: Record of the first slice.
        N0: Rows of the first slice; a slice that the layer lacks has none.
        MANY: Whether a slot may have more than one row.
        ADD: Whether y holds the base's output; if not, the delta is put there, zeros included.
        WAIT: Whether the launch may begin before the one ahead of it has ended.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    entry, start, rows, column = slice_of(
        tile, entry0, entry1, entry2, entry3, N0, N1, N2, N3, BN
    )
    slot, first, count = group_of(starts, group, SLOTS, SLOTS_WIDTH, _WIDTH)
    if count == 0:
        return
    image, record = record_of(slots, slot_bytes, slot, entry)
    present = tl.load(record) | tl.load(record + 10) | tl.load(record + 13) | tl.load(record + 22)
    if ADD and present == 0:
        return
    n_N = start + tl.arange(0, BN)
    row_N, known_N = coded_row(image, record, n_N, rows, ROW_MAP)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    if count == 1:
        place = tl.load(order + first).to(tl.int64)
        y_at = y + place * y_stride + column + n_N
        delta_N = _tile_one(
            image, record, x + place * x_stride, n_N, row_N, known_N, K, BN, BJ, UNROLL,
            SPLIT, STAGES, WIDTH, ASSEMBLY,
        )  # fmt: skip
        _write(y_at, delta_N, known_N, ADD)
    elif MANY:
        base = group.to(tl.int64) * CHUNKS
        delta_NM = _tile_many(
            image, record, staged + base * (_CHUNK * _WIDTH), sums + base * (3 * _WIDTH), n_N,
            row_N, known_N, K, BN, BJ_MANY, STAGES_MANY, WIDTH_MANY, ASSEMBLY, CHUNKS, CHUNK_WIDTH,
        )  # fmt: skip
        m_M = tl.arange(0, _WIDTH)
        place_M = tl.load(order + first + m_M, mask=m_M < count, other=0).to(tl.int64)
        at = y + place_M[None, :] * y_stride + column + n_N[:, None]
        mask = known_N[:, None] & (m_M < count)[None, :]
        _write(at, delta_NM, mask, ADD)
