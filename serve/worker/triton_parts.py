"""Several programs for one tile: each multiplies a part of the columns, the last one to end adds their sums to y.

Grids follow from shapes, so that a batch of 16 rows gets programs for 16 slots. Where all rows belong to one
slot, fifteen of sixteen would have nothing to do, and the others too few to fill the device: then
programs share the tiles out. Sums are whole numbers, added atomically: their order changes nothing.

The room for sums is noughts before a launch and after it, so that it can be used by the next one. Launches
that use it must not run at the same time: those of one device go to one stream.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import GROUP

# Programs that a launch is shared out to, measured on an H100: four for each of its multiprocessors. Twice as many
# took 36 instead of 28 µs (four slots of four rows, 4096 × 4096) and 42 instead of 31 (one slot, 28672 × 4096).
PROGRAMS = 528
LARGEST_TILE = 64

_PROGRAMS: tl.constexpr = tl.constexpr(PROGRAMS)
_WIDTH: tl.constexpr = tl.constexpr(GROUP)


@cache
def room_for_sums(device: torch.device) -> torch.Tensor:
    """A device's room, int32: a counter for each tile that is shared out, then its sums.

    First asked for before any CUDA graph is captured, as noughts have to be written at once.
    """
    shared_tiles = PROGRAMS // 2
    size = PROGRAMS + shared_tiles * 2 * LARGEST_TILE * GROUP
    return torch.zeros(size, dtype=torch.int32, device=device)


@triton.jit
def share_out(index, groups, HALVINGS: tl.constexpr):
    """Group, part and parts of a program, from its place in the second dimension of its grid.

    Args:
        index: The program's place.
        groups: Groups of the batch.
        HALVINGS: Of the work, at most.
    """
    tiles, places = tl.num_programs(0), tl.num_programs(1)
    parts = tl.zeros_like(groups) + 1
    for _ in tl.static_range(HALVINGS):
        twice = groups * parts * 2
        parts = tl.where((twice <= places) & (twice * tiles <= _PROGRAMS), parts * 2, parts)
    return index // parts, index % parts, parts


@triton.jit
def steps_of_part(part, parts, STEPS: tl.constexpr):
    """First of a part's steps, and the one behind its last."""
    each = (STEPS + parts - 1) // parts
    return part * each, tl.minimum(part * each + each, STEPS)


@triton.jit
def span_of_part(begin_N, end_N, part, parts):
    """A part's share of each span."""
    each_N = (end_N - begin_N + parts - 1) // parts
    begin_N = tl.minimum(begin_N + part * each_N, end_N)
    return begin_N, tl.minimum(begin_N + each_N, end_N)


@triton.jit
def join(room, tile, parts, high, low, at, mask, BN: tl.constexpr):
    """Add a part's sums to those of the other parts.

    Args:
        room: See `room_for_sums`.
        tile: Which tile of those that are shared out.
        parts: Parts of the tile.
        high: int32, of the high digits.
        low: int32, of the low digits and of escapes.
        at: Place of each sum in the tile.
        mask: Which sums there are.

    Returns:
        Whether this part was the last one; for it all parts' sums, high and low.
    """
    size: tl.constexpr = BN * _WIDTH
    sums = room + _PROGRAMS + tile.to(tl.int64) * (2 * size) + at
    tl.atomic_add(sums, high, mask=mask, sem="relaxed")
    tl.atomic_add(sums + size, low, mask=mask, sem="relaxed")
    # All threads have added before one of them counts: what follows the count sees it.
    tl.debug_barrier()
    last = tl.atomic_add(room + tile, 1, sem="acq_rel") == parts - 1
    if last:
        high = tl.load(sums, mask=mask, other=0, cache_modifier=".cg")
        low = tl.load(sums + size, mask=mask, other=0, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(sums, tl.zeros_like(high), mask=mask)
        tl.store(sums + size, tl.zeros_like(low), mask=mask)
        tl.store(room + tile, 0)
    return last, high, low
