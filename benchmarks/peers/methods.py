"""Published delta compressors, written anew from their papers, to compare deltamux with.

| name | method |
|---|---|
| bitdelta | a sign and one scale: BitDelta (Liu et al. 2024, arXiv 2402.10193) |
| me-switch | 2 bits and a few fp16 input channels: ME-Switch (Liu et al. 2024, arXiv 2406.09041) |
| deltazip-2, -4 | SparseGPT to 2:4 and 2 or 4 bits: DeltaZip (Yao et al. 2023, arXiv 2312.05215) |
| delta-come | singular vectors in 8, 3 and 2 bits: Delta-CoMe (Ping et al. 2024, arXiv 2406.08903) |
| dare-4 | random drop and rescale: DARE (Yu et al. 2023, arXiv 2311.03099), then 4 bits |
| low-rank | the leading singular vectors in fp16 |
| rtn-2, -3, -4 | round to nearest on a min–max grid |

A peer takes one linear's delta and returns what is rebuilt from its file, with the size of that
file: codes, scales, zero points, positions and singular values, rounded up to a byte a matrix.
Scales and factors are fp16 but BitDelta's, which is fp32. Where a paper leaves a choice open, the
choice that gives less error or fewer bytes is taken. Two of them go on to train scales on the
model's logits; their parts are returned for that by `bitdelta_parts` and `me_switch_parts`.

Shapes: N output rows, K input channels; B rows of a block, T candidate steps.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.peers.feedback import curvature, feedback, half, symmetric_rows
from benchmarks.peers.vectors import mixed_precision, truncated

# ME-Switch: candidates of a row's step, in root mean squares of the row, and where zero may lie.
STEP_CANDIDATES = torch.logspace(-0.4, 0.8, 40).tolist()
ZERO_POINTS = (1.5, 2.0)
ROW_BLOCK = 128


@dataclass(frozen=True)
class Matrix:
    """One linear: its delta float32 [N, K] and the second moment E[x xᵀ] of its inputs, float32."""

    delta_NK: torch.Tensor
    moment_KK: torch.Tensor


@dataclass(frozen=True)
class Compressed:
    """Rebuilt delta float32 [N, K] and the bytes that it takes on disk."""

    delta_NK: torch.Tensor
    num_bytes: int


Peer = Callable[[Matrix], Compressed]


def bitdelta(matrix: Matrix) -> Compressed:
    """BitDelta before its distillation: one bit a weight and an fp32 scale."""
    sign_NK, scale = bitdelta_parts(matrix)
    return Compressed(sign_NK * scale, _bytes(sign_NK.numel() + 32))


def bitdelta_parts(matrix: Matrix) -> tuple[torch.Tensor, float]:
    """Signs, ±1 in float32 [N, K], and the scale mean|Δ|, which is least-squares optimal."""
    sign_NK = torch.where(matrix.delta_NK > 0, 1.0, -1.0)
    return sign_NK, float(matrix.delta_NK.abs().mean())


def me_switch(salient_channels: int = 8) -> Peer:
    """ME-Switch before its distillation: 2 bits with a step a row, and fp16 input channels.

    Bytes beside the codes: an fp16 step a row, fp16 values and a 16-bit index of each salient
    channel, and one byte for the zero point.

    Args:
        salient_channels: How many input channels are kept in fp16.
    """

    def compress(matrix: Matrix) -> Compressed:
        levels_NK, steps_N, salient_NK = me_switch_parts(matrix, salient_channels)
        rows, columns = levels_NK.shape
        kept = min(salient_channels, columns)
        bits = 2 * rows * (columns - kept) + 16 * rows + 16 * kept * (rows + 1) + 8
        return Compressed(levels_NK * steps_N.unsqueeze(1) + salient_NK, _bytes(bits))

    return compress


def me_switch_parts(
    matrix: Matrix, salient_channels: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [N, K], steps [N] and fp16 channels [N, K] of Δ̂ = step · level + channels, float32.

    The salient channels are those whose quantization costs the output most, E[x_j²] ‖Δ_j − Δ̂_j‖².
    Steps minimise the squared error of the other channels. Four levels are symmetric either with
    or without zero among them, {−2, −1, 0, 1} or {±½, ±1½}: a matrix uses the better of the two.
    """
    delta_NK = matrix.delta_NK
    searched = {zero: _two_bit_steps(delta_NK, zero) for zero in ZERO_POINTS}
    zero = min(searched, key=lambda zero: searched[zero][1])
    steps_N, _ = searched[zero]
    residual_NK = delta_NK - _two_bit_levels(delta_NK, steps_N, zero) * steps_N.unsqueeze(1)
    damage_K = matrix.moment_KK.diagonal() * residual_NK.square().sum(dim=0)
    salient = torch.zeros(delta_NK.shape[1], dtype=torch.bool)
    salient[damage_K.topk(min(salient_channels, len(damage_K))).indices] = True
    steps_N, _ = _two_bit_steps(delta_NK[:, ~salient], zero)
    levels_NK = _two_bit_levels(delta_NK, steps_N, zero).masked_fill_(salient, 0)
    return levels_NK, steps_N, half(delta_NK) * salient


def deltazip(num_bits: int) -> Peer:
    """DeltaZip: SparseGPT on the delta, two of every four weights, a min–max grid a row.

    A kept weight takes its code and a 2-bit position among the four, a row an fp16 step.

    Args:
        num_bits: Width of a code.
    """

    def compress(matrix: Matrix) -> Compressed:
        rows, columns = matrix.delta_NK.shape
        grid = symmetric_rows(matrix.delta_NK, num_bits)
        inputs = curvature(matrix.moment_KK)
        rebuilt_NK = feedback(matrix.delta_NK, grid, inputs, two_of_four=True)
        kept = 2 * rows * -(-columns // 4)
        return Compressed(rebuilt_NK, _bytes(kept * (num_bits + 2) + 16 * rows))

    return compress


def delta_come(bits_per_weight: float) -> Peer:
    """Delta-CoMe: singular vectors in 8, 3 and 2 bits, rounded with feedback; see `vectors.py`.

    Args:
        bits_per_weight: Budget of the whole file, which fixes the rank. Rank 1, the least there
            is, can exceed a tiny one.
    """
    return _within(
        bits_per_weight,
        lambda matrix, budget: mixed_precision(matrix.delta_NK, matrix.moment_KK, budget),
    )


def dare(drop: float, bits: int, seed: int = 0) -> Peer:
    """DARE: drop weights at random and rescale the rest, which are then rounded to nearest.

    A survivor takes its code, a row an fp16 step; where the survivors are takes a bitmap, or a
    16-bit column a survivor and a 16-bit count a row where that is less. (The paper merges the
    delta into the base and stores no positions; a format that draws them again from the seed
    could leave them out.)

    Args:
        drop: Probability of a weight to be dropped.
        bits: Width of a survivor's code.
        seed: Start of the random numbers, which also depend on the delta: matrices of one shape
            are dropped independently.
    """

    def compress(matrix: Matrix) -> Compressed:
        rows, columns = matrix.delta_NK.shape
        content = zlib.crc32(matrix.delta_NK.contiguous().numpy().tobytes())
        generator = torch.Generator().manual_seed(seed + content)
        kept_NK = torch.rand(rows, columns, generator=generator) >= drop
        scaled_NK = matrix.delta_NK * kept_NK / (1 - drop)
        rebuilt_NK = symmetric_rows(scaled_NK, bits).round(scaled_NK) * kept_NK
        survivors = int(kept_NK.sum())
        positions = min(rows * columns, 16 * (survivors + rows))
        return Compressed(rebuilt_NK, _bytes(bits * survivors + positions + 16 * rows))

    return compress


def low_rank(bits_per_weight: float) -> Peer:
    """LoRA extraction: the leading singular vectors, in two fp16 factors.

    Args:
        bits_per_weight: Budget of the whole file, which fixes the rank. Rank 1, the least there
            is, can exceed a tiny one.
    """
    return _within(bits_per_weight, lambda matrix, budget: truncated(matrix.delta_NK, budget))


def _within(
    bits_per_weight: float, rebuild: Callable[[Matrix, float], tuple[torch.Tensor, int]]
) -> Peer:
    """A peer from what rebuilds a delta within a budget in bits, and says how many it took."""

    def compress(matrix: Matrix) -> Compressed:
        rebuilt_NK, bits = rebuild(matrix, bits_per_weight * matrix.delta_NK.numel())
        return Compressed(rebuilt_NK, _bytes(bits))

    return compress


def rtn(num_bits: int) -> Peer:
    """Round to nearest on the symmetric min–max grid of each row, with an fp16 step a row.

    Args:
        num_bits: Width of a code.
    """

    def compress(matrix: Matrix) -> Compressed:
        rows, columns = matrix.delta_NK.shape
        rebuilt_NK = symmetric_rows(matrix.delta_NK, num_bits).round(matrix.delta_NK)
        return Compressed(rebuilt_NK, _bytes(num_bits * rows * columns + 16 * rows))

    return compress


PEERS: dict[str, Peer] = {
    "bitdelta": bitdelta,
    "me-switch": me_switch(),
    "deltazip-2": deltazip(2),
    "deltazip-4": deltazip(4),
    "delta-come": delta_come(1.0),
    "dare-4": dare(0.9, 4),
    "low-rank": low_rank(1.0),
    "rtn-2": rtn(2),
    "rtn-3": rtn(3),
    "rtn-4": rtn(4),
}


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _two_bit_levels(delta_NK: torch.Tensor, steps_N: torch.Tensor, zero: float) -> torch.Tensor:
    inverse_N1 = torch.where(steps_N > 0, 1 / steps_N, 0.0).unsqueeze(1)
    return (delta_NK * inverse_N1).add_(zero).round_().clamp_(0, 3).sub_(zero)


def _two_bit_steps(delta_NK: torch.Tensor, zero: float) -> tuple[torch.Tensor, float]:
    """The fp16 step of every row with the least squared error, and the error of all rows."""
    steps: list[torch.Tensor] = []
    error = 0.0
    for block_BK in delta_NK.split(ROW_BLOCK):
        size_B = torch.linalg.vector_norm(block_BK, dim=1) / max(1, block_BK.shape[1]) ** 0.5
        steps_TB = half(torch.tensor(STEP_CANDIDATES).unsqueeze(1) * size_B)
        errors_TB = torch.stack([_two_bit_error(block_BK, row, zero) for row in steps_TB])
        least_B, best_B = errors_TB.min(dim=0)
        steps.append(steps_TB.gather(0, best_B.unsqueeze(0)).squeeze(0))
        error += float(least_B.sum())
    return torch.cat(steps), error


def _two_bit_error(delta_BK: torch.Tensor, steps_B: torch.Tensor, zero: float) -> torch.Tensor:
    levels_BK = _two_bit_levels(delta_BK, steps_B, zero)
    return levels_BK.mul_(steps_B.unsqueeze(1)).sub_(delta_BK).square_().sum(dim=1)
