"""The Triton kernel of `blocks.py`: a program has all channels of a block for some rows, in registers.

Shapes: B channels of the block, M rows.
"""

import torch
import triton
import triton.language as tl

from deltamux.compression.rounding.blocks import GPU_CHANNELS, Block, Levels

ROWS = 64
# Adding and taking off 1.5 · 2²³ rounds numbers below 2²² to the nearest whole one, halves to the even one.
_WHOLE: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def block_kernel(  # noqa: PLR0917
    work, codes, errors, lost, factor, exact, keep, steps, inverse, offset, lowest, highest, rows, channels,
    KEEP: tl.constexpr, B: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Round BM rows; grid (tiles of rows)."""
    m_M = tl.program_id(0) * BM + tl.arange(0, BM)
    b_B = tl.arange(0, B)
    inside_M = m_M < rows
    at_BM = b_B[:, None].to(tl.int64) * rows + m_M[None, :]
    tile_BM = tl.load(work + at_BM, mask=(b_B < channels)[:, None] & inside_M[None, :], other=0.0)
    step_M = tl.load(steps + m_M, mask=inside_M, other=0.0)
    inverse_M = tl.load(inverse + m_M, mask=inside_M, other=0.0)
    offset_M = tl.load(offset + m_M, mask=inside_M, other=0.0)
    lowest_M = tl.load(lowest + m_M, mask=inside_M, other=0.0)
    highest_M = tl.load(highest + m_M, mask=inside_M, other=0.0)
    lost_M = tl.load(lost + m_M, mask=inside_M, other=0.0)
    for j in tl.range(0, channels):
        row_M = tl.sum(tl.where((b_B == j)[:, None], tile_BM, 0.0), 0)
        level_M = tl.minimum(tl.maximum(row_M * inverse_M, lowest_M), highest_M) - offset_M
        level_M = (level_M + _WHOLE) - _WHOLE + offset_M
        at_M = j * rows + m_M
        if KEEP:
            level_M *= tl.load(keep + at_M, mask=inside_M, other=0).to(tl.float32)
        tl.store(codes + at_M, (level_M - lowest_M).to(tl.uint8), mask=inside_M)
        rest_M = row_M - level_M * step_M
        line_B = tl.load(factor + j * channels + b_B, mask=(b_B >= j) & (b_B < channels), other=0.0)
        diagonal = tl.sum(tl.where(b_B == j, line_B, 0.0), 0)
        is_exact = tl.load(exact + j) != 0
        if is_exact:
            tl.store(work + at_M, rest_M, mask=inside_M)
        error_M = tl.where(is_exact, 0.0, rest_M / diagonal)
        tl.store(errors + at_M, error_M, mask=inside_M)
        lost_M += error_M * error_M
        tile_BM -= line_B[:, None] * error_M[None, :]
    tl.store(lost + m_M, lost_M, mask=inside_M)


def launch_block(block: Block, factor_BB: torch.Tensor, levels: Levels) -> torch.Tensor:
    """See `blocks.round_block`."""
    errors_BM = torch.empty_like(block.work_BM)
    channels, rows = block.work_BM.shape
    exact_B = block.exact_B.view(torch.uint8)
    keep_BM = exact_B if block.keep_BM is None else block.keep_BM.view(torch.uint8)
    block_kernel[(-(-rows // ROWS),)](
        block.work_BM, block.codes_BM, errors_BM, levels.lost_M, factor_BB, exact_B, keep_BM,
        levels.steps_M, levels.inverse_M, levels.offset_M, levels.lowest_M, levels.highest_M,
        rows, channels, KEEP=block.keep_BM is not None, B=GPU_CHANNELS, BM=ROWS, num_warps=4,
    )  # fmt: skip
    return errors_BM
