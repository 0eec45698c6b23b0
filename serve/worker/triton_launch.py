"""Launching the grouped product on a GPU: fixed grids, nothing read back, safe in a CUDA graph.

Two launches: the batch's inputs become whole numbers (`triton_digits.py`), then all slots' deltas
are multiplied and added. Grids follow from the layer and from the rows of the call, never from what
the batch or the slots hold; programs that find fewer groups than there might be share their work out
(`triton_parts.py`). Sums run over whole numbers: a row's result does not depend on the
other rows of its batch.
"""

from dataclasses import dataclass

import torch
import triton

from deltamux.serve.worker.triton_digits import launch_digits
from deltamux.serve.worker.triton_factors import launch_factors
from deltamux.serve.worker.triton_image import GROUP
from deltamux.serve.worker.triton_kernel import product_kernel
from deltamux.serve.worker.triton_parts import room_for_sums

MAX_SLICES = 4
# Groups of one launch: bounds the inputs' buffers where a prompt belongs to no slot in large part.
MOST_GROUPS = 64


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut up.

    Attributes:
        rows: Rows of the weight a program multiplies.
        bytes: Bytes of a row that one load reads (four codes each), for single rows.
        unroll: Loads of a step.
        split: Parts that a row is cut into, one for each warp.
        stages: Steps under way at once plus one.
        width: Escapes of a row handled at once.
        bytes_many: As `bytes`, for groups; likewise the two that follow.
        warps: Warps of a program.
        registers: Most registers of a thread; None: no limit.
        fetch: Whether a program asks for all it needs before it waits for the inputs.
        halvings: Of a tile's work among programs, at most; for groups.
    """

    rows: int = 64
    bytes: int = 128
    unroll: int = 1
    split: int = 1
    stages: int = 4
    width: int = 16
    bytes_many: int = 64
    stages_many: int = 3
    width_many: int = 2
    warps: int = 2
    registers: int | None = None
    fetch: bool = False
    halvings: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What the kernels may use: inline assembly (not in the interpreter), early starts (sm_90)."""

    assembly: bool
    early_start: bool


def groups_of(rows: int, slots: int, tile: int = GROUP) -> int:
    """Most groups of up to `tile` rows of one slot that a batch can have."""
    return min(rows, slots) + max(rows - slots, 0) // tile


# Chosen by timing on an H200 and an H100 at Mistral-7B's shapes: of several, the fastest where they are used.
# One row: a short wait counts, so small matrices are cut small, and loads are begun early.
LATENCY = Tiling(rows=16, split=4, width=32, warps=4, fetch=True)
SINGLE = Tiling(rows=32)
# More rows: few instructions a weight, or enough programs where that leaves too few.
MIDDLE = Tiling(rows=32, width_many=4, halvings=2)
# Without a limit the compiler aims at 168 registers and spills a few.
THROUGHPUT = Tiling(rows=64, unroll=2, stages=3, registers=232, halvings=3)
FEW_PROGRAMS, MANY_TILES, MANY_ROWS = 264, 256, 16


def choose_tiling(sizes: tuple[int, ...], rows: int) -> Tiling:
    """How to cut a launch up, from shapes alone.

    Args:
        sizes: Rows of each slice.
        rows: Rows of the batch.
    """
    if rows == 1:
        programs = sum(-(-size // 32) for size in sizes)
        return LATENCY if programs < FEW_PROGRAMS else SINGLE
    tiles = sum(-(-size // THROUGHPUT.rows) for size in sizes)
    return THROUGHPUT if tiles >= MANY_TILES or rows > MANY_ROWS else MIDDLE


def launch_product(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    entries: tuple[int, ...],
    slice_rows: tuple[int, ...],
    rank: int,
    row_map: bool,
    capabilities: Capabilities,
    tiling: Tiling | None = None,
    most: int | None = None,
) -> None:
    """y[rows of s] += x Δ̂_sᵀ + bias_s, from every slot's records.

    Args:
        y_TN: The base's output, last stride 1, written in place.
        x_TK: Input, last stride 1.
        slot_of_row: Slot of each row, −1: the base.
        order: Rows of the batch by slot.
        starts: Where each slot's begin, on the device [S + 1].
        slots: uint8 [S, bytes of a slot].
        entries: Record of each slice.
        slice_rows: Rows of each slice.
        rank: The largest rank of factors that a record may have.
        row_map: Whether the record may lack rows (embedding, lm_head).
        capabilities: What the kernels may use.
        tiling: How to cut the launch up; None: chosen by shape.
        most: Slots with more rows are left out; None: none is.
    """
    rows, count = x_TK.shape[0], slots.shape[0]
    places, where = _Places.of(entries, slice_rows, most or rows), (order, starts, slots)
    cut, total = tiling or choose_tiling(slice_rows, rows), groups_of(rows, count)
    for skipped in range(0, total, MOST_GROUPS):
        part = (min(MOST_GROUPS, total - skipped), skipped, places.most)
        _launch(y_TN, x_TK, slot_of_row, *where, places, part, row_map, capabilities, cut)
        if rank > 0:
            launch_factors(y_TN, x_TK, *where, places.records, places.sizes, rank, part)


@dataclass(frozen=True)
class _Places:
    """Records and rows of a layer's slices, four of each, and the most rows of a slot."""

    records: tuple[int, ...]
    sizes: tuple[int, ...]
    most: int

    @classmethod
    def of(cls, entries: tuple[int, ...], sizes: tuple[int, ...], most: int) -> "_Places":
        """Those of a layer, which may have fewer slices."""
        return cls((*entries, 0, 0, 0)[:MAX_SLICES], (*sizes, 0, 0, 0)[:MAX_SLICES], most)


def _launch(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    places: _Places,
    part: tuple[int, int, int],
    row_map: bool,
    capabilities: Capabilities,
    cut: Tiling,
) -> None:
    rows, columns = x_TK.shape
    groups, skipped, most = part
    count, early = slots.shape[0], capabilities.early_start
    made = launch_digits(x_TK, order, starts, count, part, early)
    room = room_for_sums(x_TK.device)
    tiles = sum(-(-size // cut.rows) for size in places.sizes)
    # Programs share tiles out where one launch has all groups.
    halvings = cut.halvings if rows > 1 and skipped == 0 and groups < MOST_GROUPS else 0
    options: dict[str, object] = {"launch_pdl": True} if early else {}
    product_kernel[(tiles, max(groups, 1 << halvings))](
        y_TN, y_TN.stride(0), made.digits, made.levels, made.columns, made.meta, room,
        slot_of_row, order, starts, slots, slots.stride(0), *places.records, most, skipped, *places.sizes, K=columns,
        SLOTS=count, SLOTS_WIDTH=triton.next_power_of_2(count), BN=cut.rows, BB=cut.bytes,
        UNROLL=cut.unroll, SPLIT=cut.split, STAGES=cut.stages, WIDTH=cut.width,
        BB_MANY=cut.bytes_many, STAGES_MANY=cut.stages_many, WIDTH_MANY=cut.width_many,
        MANY=rows > 1, MAPPED=row_map, FETCH=cut.fetch, ASSEMBLY=capabilities.assembly,
        WAIT=early, HALVINGS=halvings, num_warps=cut.warps, maxnreg=cut.registers, **options,
    )  # fmt: skip
