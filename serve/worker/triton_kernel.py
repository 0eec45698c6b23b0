"""The grouped product: one launch adds the deltas of all slots and slices of a layer to its output.

A program has a tile of rows of one slice and one group of the batch (rows of one slot). It reads
the slot's record, multiplies and adds its tile into y; programs without work return after one load.

What the kernel is given beside its layer's shapes: the batch's inputs (`digits`, `levels`, `columns`
and `meta`, see `triton_digits.py`); `room`, where programs that share a tile add their sums (see
`triton_parts.py`); the record of each slice (`entry0` …; a slice that the layer lacks has no rows, N1 =
0); how many rows a slot may have before it is left out (`most`) and how many groups lie in front of
the first (`skipped`). MANY says that the batch has more than one row, WAIT that the launch may begin
before the one ahead of it has ended.

Shapes: N rows of the tile, M rows of the group, K columns, S slots.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_codes import product_many, product_one
from deltamux.serve.worker.triton_digits import inputs_of, meta_size, total_of
from deltamux.serve.worker.triton_image import (
    CHANNELS,
    ESCAPES,
    GROUP,
    PLANE0,
    PLANES,
    STARTS,
    VECTOR,
    ZERO,
    coded_row,
    group_at,
    number,
    record_of,
    section,
    steps_of,
    tiles_of,
    vector_of,
)
from deltamux.serve.worker.triton_parts import join, share_out
from deltamux.serve.worker.triton_rest import (
    channels_many,
    channels_one,
    escapes_many,
    escapes_one,
    first_escapes,
)

_WIDTH: tl.constexpr = tl.constexpr(GROUP)


@triton.jit
def slice_of(
    tile, entry0, entry1, entry2, entry3, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    N3: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Entry, first row, rows, first column of y and number of the slice that a tile lies in."""
    tiles0: tl.constexpr = (N0 + BN - 1) // BN
    tiles1: tl.constexpr = tiles0 + (N1 + BN - 1) // BN
    tiles2: tl.constexpr = tiles1 + (N2 + BN - 1) // BN
    entry, start, rows, column, part = entry0, tile * BN, N0, 0, 0
    if N1 > 0 and tile >= tiles0:
        entry, start, rows, column, part = entry1, (tile - tiles0) * BN, N1, N0, 1
    if N2 > 0 and tile >= tiles1:
        entry, start, rows, column, part = entry2, (tile - tiles1) * BN, N2, N0 + N1, 2
    if N3 > 0 and tile >= tiles2:
        entry, start, rows, column, part = entry3, (tile - tiles2) * BN, N3, N0 + N1 + N2, 3
    return entry, start, rows, column, part


@triton.jit
def fetch_ahead(image, record, row_N, K: tl.constexpr):
    """Ask for the tile's bytes of plane 0 and starts of escapes to come into the L2 cache."""
    bytes: tl.constexpr = (K + 63) // 64 * 16
    blocks: tl.constexpr = (K + 4095) // 4096
    lines: tl.constexpr = triton.next_power_of_2((bytes + 127) // 128)
    plane = section(image, record, PLANE0, tl.uint8)
    line_L = tl.minimum(tl.arange(0, lines) * 128, bytes - 1)
    at = plane + row_N[:, None].to(tl.int64) * bytes + line_L[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    starts = section(image, record, STARTS, tl.int32) + row_N * blocks
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [starts.to(tl.int64)], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _row_parts(at_N, image, record, n_N, row_N, known_N):
    """What a tile needs beside its codes and escapes: y with the vector, steps."""
    y_N = tl.load(at_N, mask=known_N, other=0.0).to(tl.float32)
    return y_N + vector_of(image, record, n_N, known_N), steps_of(image, record, row_N)


@triton.jit
def _tile_one(
    at_N, image, record, digits, levels, meta, room, shared, part, parts, n_N, row_N, known_N,
    K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, WIDTH: tl.constexpr, FETCH: tl.constexpr, ASSEMBLY: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Add the delta of one row of the batch, or a part of it, to y at `at_N`."""
    high_N = tl.zeros([BN], tl.int32)
    low_N = high_N
    planes = tl.load(record + PLANES)
    if FETCH:
        y_N, step_N = _row_parts(at_N, image, record, n_N, row_N, known_N)
        begin_N, end_N, ahead = first_escapes(image, record, row_N, known_N, part, parts, K, WIDTH)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for p in tl.range(0, planes):
        plane = section(image, record, PLANE0 + p, tl.uint8)
        h_N, l_N = product_one(
            plane, digits, row_N, part, parts, K, BN, BB, UNROLL, SPLIT, STAGES, ASSEMBLY
        )
        high_N += h_N * tl.where(p == 0, 1, 4)
        low_N += l_N * tl.where(p == 0, 1, 4)
    if not FETCH:
        begin_N, end_N, ahead = first_escapes(image, record, row_N, known_N, part, parts, K, WIDTH)
    low_N += escapes_one(image, record, levels, row_N, begin_N, end_N, ahead, K, BN, WIDTH)
    last = parts == 1
    if parts > 1:
        place_N = tl.arange(0, BN)
        last, high_N, low_N = join(room, shared, parts, high_N, low_N, place_N, place_N < BN, BN)
    if last:
        if not FETCH:
            y_N, step_N = _row_parts(at_N, image, record, n_N, row_N, known_N)
        codes_N = high_N.to(tl.float32) * 256.0 + low_N.to(tl.float32)
        codes_N -= tl.where(planes > 0, number(record, ZERO), 0.0) * total_of(meta, 0, True, K)
        rest_N = channels_one(image, record, levels, n_N, known_N, BN)
        y_N += (codes_N * step_N + rest_N) * tl.load(meta)
        tl.store(at_N, y_N.to(at_N.dtype.element_ty), mask=known_N)


@triton.jit
def _sums_many(
    image, record, digits, columns, part, parts, row_N, known_N, K: tl.constexpr, BN: tl.constexpr,
    BB: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A part of a group's sums over codes and escapes, int32 [N, M], by high and low digits."""
    high_NM = tl.zeros([BN, _WIDTH], tl.int32)
    low_NM = high_NM
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for p in tl.range(0, tl.load(record + PLANES)):
        plane = section(image, record, PLANE0 + p, tl.uint8)
        h_NM, l_NM = product_many(
            plane, digits, row_N, part, parts, K, BN, BB, SPLIT, STAGES, ASSEMBLY
        )
        high_NM += h_NM * tl.where(p == 0, 1, 4)
        low_NM += l_NM * tl.where(p == 0, 1, 4)
    low_NM += escapes_many(image, record, columns, row_N, known_N, part, parts, K, BN, WIDTH)
    return high_NM, low_NM


@triton.jit
def _all_sums(room, shared, parts, high_NM, low_NM, count, BN: tl.constexpr):
    """Whether no part of a group's tile is missing, and then the sums of all."""
    last = parts == 1
    if parts > 1:
        m_M = tl.arange(0, _WIDTH)
        place_NM = tl.arange(0, BN)[:, None] * _WIDTH + m_M[None, :]
        mask_NM = (place_NM >= 0) & (m_M < count)[None, :]
        last, high_NM, low_NM = join(room, shared, parts, high_NM, low_NM, place_NM, mask_NM, BN)
    return last, high_NM, low_NM


@triton.jit
def _delta_many(
    image, record, high_NM, low_NM, columns, meta, count, n_N, row_N, known_N, K: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The delta of a group, float32 [N, M], from its sums."""
    m_M = tl.arange(0, _WIDTH)
    scale_M = tl.load(meta + m_M * meta_size(K), mask=m_M < count, other=0.0)
    total_M = total_of(meta, m_M, m_M < count, K)
    zero = tl.where(tl.load(record + PLANES) > 0, number(record, ZERO), 0.0)
    codes_NM = high_NM.to(tl.float32) * 256.0 + low_NM.to(tl.float32) - zero * total_M[None, :]
    rest_NM = channels_many(image, record, columns, n_N, known_N, BN)
    step_N, bias_N = steps_of(image, record, row_N), vector_of(image, record, n_N, known_N)
    return (codes_NM * step_N[:, None] + rest_NM) * scale_M[None, :] + bias_N[:, None]


@triton.jit
def _changes(record):
    """Whether a record adds anything to its rows, factors apart."""
    planes_and_escapes = tl.load(record + PLANES) | tl.load(record + ESCAPES)
    return (planes_and_escapes | tl.load(record + CHANNELS) | tl.load(record + VECTOR)) != 0


@triton.jit
def _add_group(y, y_stride, column, order, first, count, n_N, known_N, delta_NM):
    """Add a group's delta to its rows of y."""
    m_M = tl.arange(0, _WIDTH)
    mask = known_N[:, None] & (m_M < count)[None, :]
    row_M = tl.load(order + first + m_M, mask=m_M < count, other=0).to(tl.int64)
    at_NM = y + row_M[None, :] * y_stride + column + n_N[:, None]
    delta_NM += tl.load(at_NM, mask=mask, other=0.0).to(tl.float32)
    tl.store(at_NM, delta_NM.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tile_many(
    y, y_stride, column, image, record, digits, columns, meta, room, shared, part, parts, order, first,
    count, n_N, row_N, known_N, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, ASSEMBLY: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Add the delta of a group's rows, or a part of it, to y."""
    high_NM, low_NM = _sums_many(
        image, record, digits, columns, part, parts, row_N, known_N, K, BN, BB, SPLIT, STAGES,
        WIDTH, ASSEMBLY, WAIT,
    )  # fmt: skip
    last, high_NM, low_NM = _all_sums(room, shared, parts, high_NM, low_NM, count, BN)
    if last:
        delta_NM = _delta_many(
            image, record, high_NM, low_NM, columns, meta, count, n_N, row_N, known_N, K, BN
        )
        _add_group(y, y_stride, column, order, first, count, n_N, known_N, delta_NM)


@triton.jit
def _own_group(
    slot_of_row, order, starts, most, skipped, SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr,
    MANY: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Group, part and parts of this program, its slot (−1: none), first place in `order`, rows, row."""
    group, part, parts = tl.program_id(1), 0, 1
    if MANY:
        begin_S, end_S, tiles_S = tiles_of(starts, most, SLOTS, SLOTS_WIDTH, _WIDTH)
        if HALVINGS > 0:
            group, part, parts = share_out(group, tl.sum(tiles_S, 0), HALVINGS)
        slot, first, count = group_at(begin_S, end_S, tiles_S, group + skipped, SLOTS_WIDTH, _WIDTH)
        row = tl.load(order + first, mask=count > 0, other=0).to(tl.int64)
        slot = tl.where(count > 0, slot, -1)
    else:
        slot, first, count = tl.load(slot_of_row).to(tl.int32), 0, 1
        row = tl.zeros_like(slot).to(tl.int64)
    return group, part, parts, slot, first, count, row


@triton.jit(do_not_specialize=["entry0", "entry1", "entry2", "entry3", "most", "skipped"])
def product_kernel(
    y, y_stride, digits, levels, columns, meta, room, slot_of_row, order, starts, slots, slot_bytes,
    entry0, entry1, entry2, entry3, most, skipped, N0: tl.constexpr, N1: tl.constexpr,
    N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    SLOTS_WIDTH: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, BB_MANY: tl.constexpr,
    STAGES_MANY: tl.constexpr, WIDTH_MANY: tl.constexpr, MANY: tl.constexpr, MAPPED: tl.constexpr,
    FETCH: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """y[rows of s] += x Δ̂_sᵀ + bias_s; grid (tiles of all slices, groups or their parts)."""
    entry, start, rows, column, _ = slice_of(
        tl.program_id(0), entry0, entry1, entry2, entry3, N0, N1, N2, N3, BN
    )
    group, part, parts, slot, first, count, row = _own_group(
        slot_of_row, order, starts, most, skipped, SLOTS, SLOTS_WIDTH, MANY, HALVINGS
    )
    if slot < 0:
        return
    image, record = record_of(slots, slot_bytes, slot, entry)
    if not _changes(record):
        return
    n_N = start + tl.arange(0, BN)
    row_N, known_N = coded_row(image, record, n_N, rows, MAPPED)
    if FETCH and ASSEMBLY:
        fetch_ahead(image, record, row_N, K)
    digits, at, meta = inputs_of(digits, meta, group, K)
    shared = group * tl.num_programs(0) + tl.program_id(0)
    if count == 1:
        _tile_one(
            y + row * y_stride + column + n_N, image, record, digits, levels + at, meta, room, shared,
            part, parts, n_N, row_N, known_N, K, BN, BB, UNROLL, SPLIT, STAGES, WIDTH, FETCH,
            ASSEMBLY, WAIT,
        )  # fmt: skip
    elif MANY:
        _tile_many(
            y, y_stride, column, image, record, digits, columns + at, meta, room, shared, part, parts,
            order, first, count, n_N, row_N, known_N, K, BN, BB_MANY, SPLIT, STAGES_MANY, WIDTH_MANY,
            ASSEMBLY, WAIT,
        )  # fmt: skip
