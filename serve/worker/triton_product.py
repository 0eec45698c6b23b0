"""Launching the grouped product on a GPU: fixed grids, nothing read back, safe in a CUDA graph.

Grids follow from the layer and from the rows of the call, never from what the batch or the slots
hold. A row's result depends on the other rows of its batch in one way: whether its slot has other
rows too (the sums then run in another order; both round once, to y's type). It does not depend on
which rows those are, nor on other slots.
"""

from dataclasses import dataclass

import torch
import triton

from deltamux.serve.worker.triton_image import GROUP
from deltamux.serve.worker.triton_kernel import product_kernel
from deltamux.serve.worker.triton_stage import CHUNK, padded_columns, stage_kernel

MAX_SLICES = 4


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut up; a word is 16 bits, eight codes.

    Attributes:
        rows: Rows of the weight a program multiplies.
        words: Words of a row that one load reads, for single rows.
        unroll: Loads of a step.
        split: Parts that a row is cut into, one for each warp.
        stages: Steps under way at once plus one.
        width: Escapes of a row handled at once.
        words_many: As `words`, for groups; likewise the two that follow.
        warps: Warps of a program.
        registers: Most registers of a thread; None: no limit.
    """

    rows: int = 32
    words: int = 64
    unroll: int = 1
    split: int = 1
    stages: int = 4
    width: int = 16
    words_many: int = 32
    stages_many: int = 3
    width_many: int = 2
    warps: int = 2
    registers: int | None = None


@dataclass(frozen=True)
class Capabilities:
    """What the kernels may use: inline assembly (not in the interpreter) and early starts (sm_90)."""

    assembly: bool
    early_start: bool


def groups_of(rows: int, slots: int, tile: int = GROUP) -> int:
    """Most groups of up to `tile` rows of one slot that a batch can have."""
    return min(rows, slots) + max(rows - slots, 0) // tile


def choose_tiling(sizes: tuple[int, ...], groups: int) -> Tiling:
    """Smaller tiles where there would be too few programs for all multiprocessors."""
    programs = sum(-(-rows // 32) for rows in sizes) * groups
    return Tiling() if programs >= 264 else Tiling(rows=16, split=4, width=32, warps=4)


def launch_product(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    entries: tuple[int, ...],
    slice_rows: tuple[int, ...],
    row_map: bool,
    capabilities: Capabilities,
    tiling: Tiling | None = None,
    add: bool = True,
) -> None:
    """y[rows of s] += x Δ̂_sᵀ + bias_s: planes, escapes, channels and vector of every slot's record.

    Args:
        y_TN: The base's output, bfloat16 or float16, last stride 1, written in place.
        x_TK: Input of the same type, last stride 1.
        order: Rows of the batch by slot.
        starts: Where each slot's begin, on the device [S + 1].
        slots: uint8 [S, bytes of a slot].
        entries: Record of each slice.
        slice_rows: Rows of each slice.
        row_map: Whether the record may lack rows (embedding, lm_head).
        capabilities: What the kernels may use.
        tiling: How to cut the launch up; None: chosen by shape.
        add: Whether y holds the base's output; if not, the rows of slots become the delta alone.
    """
    rows, columns = x_TK.shape
    count = slots.shape[0]
    groups = groups_of(rows, count)
    tiling = tiling or choose_tiling(slice_rows, groups)
    chunks = padded_columns(columns) // CHUNK
    many = rows > 1
    width = triton.next_power_of_2(count)
    staged, sums = x_TK, x_TK
    if many:
        staged = x_TK.new_empty(groups, chunks * CHUNK, GROUP)
        sums = torch.empty(groups, chunks, 3, GROUP, dtype=torch.float32, device=x_TK.device)
        stage_kernel[(groups, chunks)](
            staged, sums, x_TK, x_TK.stride(0), order, starts, SLOTS=count, SLOTS_WIDTH=width,
            K=columns, DEPENDENTS=capabilities.early_start, num_warps=4,
        )  # fmt: skip
    sizes = (*slice_rows, 0, 0, 0)[:MAX_SLICES]
    records = (*entries, 0, 0, 0)[:MAX_SLICES]
    tiles = sum(-(-size // tiling.rows) for size in slice_rows)
    early = capabilities.early_start
    options: dict[str, object] = {"launch_pdl": True} if early else {}
    product_kernel[(tiles, groups)](
        y_TN, y_TN.stride(0), x_TK, x_TK.stride(0), staged, sums, order, starts, slots,
        slots.stride(0), *records, *sizes, K=columns, SLOTS=count, SLOTS_WIDTH=width,
        CHUNKS=chunks, CHUNK_WIDTH=triton.next_power_of_2(chunks), BN=tiling.rows,
        BJ=tiling.words, UNROLL=tiling.unroll, SPLIT=tiling.split, STAGES=tiling.stages,
        WIDTH=tiling.width, BJ_MANY=tiling.words_many, STAGES_MANY=tiling.stages_many,
        WIDTH_MANY=tiling.width_many, MANY=many, ROW_MAP=row_map, ADD=add,
        ASSEMBLY=capabilities.assembly, WAIT=early, num_warps=tiling.warps,
        maxnreg=tiling.registers, **options,
    )  # fmt: skip
