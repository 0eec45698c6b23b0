"""A block of channels of a pass with feedback (`gptq.py`), rounded channel by channel.

The rows of all grids lie side by side and are independent of each other. On a CPU a compiled loop does the work
(`feedback.cpp`), on a GPU one Triton kernel a block (`block_kernel.py`); torch alone, some ten calls a channel, is
what is left where neither is there.

Shapes: B channels of the block, M rows of all grids.
"""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from deltamux.compression.image.native import load_library
from deltamux.compression.rounding.quantize import Scheme

logger = logging.getLogger("deltamux.compress")

# Channels between two updates of all that follow: a matter of speed, not of the result. Fewer make the updates, matrix
# products, wait for memory; more take longer within a block. On an AVX-512 core: 325 million elements a second within
# blocks of 64, 193 in blocks of 128. In a GPU's kernel a block lies in registers.
CPU_CHANNELS, GPU_CHANNELS = 64, 32


@dataclass(frozen=True)
class Levels:
    """What the rows of all grids are rounded to, and what that has lost of their output energy so far.

    Attributes:
        steps_M: float32, like all.
        inverse_M: 1 / step; 0 for a step of 0.
        offset_M: Of the levels from whole numbers, 0 or ½.
        lowest_M: The lowest level, of code 0.
        highest_M: The highest one.
        lost_M: Σ (w − q)² / U_jj² over the channels that are done.
    """

    steps_M: torch.Tensor
    inverse_M: torch.Tensor
    offset_M: torch.Tensor
    lowest_M: torch.Tensor
    highest_M: torch.Tensor
    lost_M: torch.Tensor

    @classmethod
    def of(cls, schemes: list[Scheme], steps_M: torch.Tensor) -> "Levels":
        """Levels of several grids that have equally many rows."""
        rows = len(steps_M) // len(schemes)

        def spread(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=steps_M.device).repeat_interleave(rows)

        zeros = [scheme.zero_point for scheme in schemes]
        tops = [scheme.levels - 1 - scheme.zero_point for scheme in schemes]
        return cls(
            steps_M=steps_M,
            inverse_M=torch.where(steps_M > 0, 1 / steps_M, 0.0),
            offset_M=spread([zero % 1 for zero in zeros]),
            lowest_M=spread([-zero for zero in zeros]),
            highest_M=spread(tops),
            lost_M=torch.zeros_like(steps_M),
        )


@dataclass(frozen=True)
class Block:
    """Channels that are rounded one after the other.

    Attributes:
        work_BM: What is to be rounded, float32, contiguous; of exact channels, what is left over afterwards.
        codes_BM: Written, uint8, contiguous.
        exact_B: bool, contiguous: channels of which nothing is lost.
        keep_BM: bool, contiguous: where False the level is 0; None: everywhere what it is.
    """

    work_BM: torch.Tensor
    codes_BM: torch.Tensor
    exact_B: torch.Tensor
    keep_BM: torch.Tensor | None

    def part(self, channels: slice) -> "Block":
        """Some of the channels, as views."""
        keep_BM = None if self.keep_BM is None else self.keep_BM[channels]
        return Block(
            self.work_BM[channels], self.codes_BM[channels], self.exact_B[channels], keep_BM
        )


def channels_of_a_block(work_KM: torch.Tensor) -> int:
    """How many channels a block has, by where they are."""
    return GPU_CHANNELS if work_KM.is_cuda else CPU_CHANNELS


def round_block(block: Block, factor_BB: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Round a block's channels.

    Args:
        block: The channels.
        factor_BB: U of them, float32, contiguous.
        levels: What they are rounded to.

    Returns:
        What each channel lost over U_jj, float32 [B, M]; nought for exact ones.
    """
    if block.work_BM.is_cuda and _has_triton():
        from deltamux.compression.rounding.block_kernel import launch_block

        return launch_block(block, factor_BB, levels)
    if not block.work_BM.is_cuda and (library := _library()):
        return _round_compiled(library, block, factor_BB, levels)
    return round_in_torch(block, factor_BB, levels)


def round_in_torch(block: Block, factor_BB: torch.Tensor, levels: Levels) -> torch.Tensor:
    """As `round_block`, by torch's own operations."""
    work_BM = block.work_BM
    reciprocal_B = factor_BB.diagonal().reciprocal().tolist()
    errors_BM = torch.zeros_like(work_BM)
    for j, exact in enumerate(block.exact_B.tolist()):
        scaled_M = (work_BM[j] * levels.inverse_M).sub_(levels.offset_M)
        level_M = scaled_M.round_().add_(levels.offset_M)
        level_M = torch.minimum(torch.maximum(level_M, levels.lowest_M), levels.highest_M)
        if block.keep_BM is not None:
            level_M *= block.keep_BM[j]
        block.codes_BM[j] = level_M - levels.lowest_M
        lost_M = torch.addcmul(work_BM[j], level_M, levels.steps_M, value=-1)
        if exact:
            work_BM[j] = lost_M
            continue
        errors_BM[j] = lost_M.mul_(reciprocal_B[j])
        levels.lost_M.addcmul_(lost_M, lost_M)
        if j + 1 < len(work_BM):
            work_BM[j + 1 :].addr_(factor_BB[j, j + 1 :], lost_M, alpha=-1)
    return errors_BM


def _round_compiled(
    library: ctypes.CDLL, block: Block, factor_BB: torch.Tensor, levels: Levels
) -> torch.Tensor:
    errors_BM = torch.empty_like(block.work_BM)
    rows = (levels.steps_M, levels.inverse_M, levels.offset_M, levels.lowest_M, levels.highest_M)
    failed = library.deltamux_round_block(
        _address(block.work_BM), *map(ctypes.c_int64, block.work_BM.shape),
        _address(factor_BB), *map(_address, rows), _address(block.keep_BM), _address(block.exact_B),
        _address(errors_BM), _address(block.codes_BM), _address(levels.lost_M),
    )  # fmt: skip
    assert not failed, "a block has more channels than the compiled loop takes"
    return errors_BM


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return load_library(Path(__file__).parent, "_feedback")
    except OSError as error:
        logger.warning("rounding takes several times as long: %s", error)
        return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
