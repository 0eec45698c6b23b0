"""Uniform grids, and rounding with error feedback, for the published compressors in peers.py.

Feedback is GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one by one, and the
error of each is spread over the columns still to come so that the output x Δᵀ suffers least. With
M = E[x xᵀ] + damping and M⁻¹ = Uᵀ U, U upper triangular, column j costs

    e_j = (w_j − q_j) / U_jj ,    w_k ← w_k − e_j U_jk   for k > j .

With `two_of_four` it also prunes, as SparseGPT does (Frantar and Alistarh 2023, arXiv 2301.00774):
of every four columns a row keeps the two with the largest w_j² / U_jj².

Nothing here is shared with deltamux's own quantizer, so that the comparison is between two
independent implementations.

Shapes: N output rows, K input channels, G groups of channels, B columns of a block.
"""

from dataclasses import dataclass

import torch

DAMPING = 0.01
BLOCK = 64


@dataclass(frozen=True)
class Grid:
    """Uniform grids that hold step · (code − zero) for codes 0 … 2^num_bits − 1.

    Attributes:
        steps_NK: float32 step at every weight, each a number that float16 holds.
        zeros_NK: float32 zero point at every weight.
        num_bits: Width of a code.
    """

    steps_NK: torch.Tensor
    zeros_NK: torch.Tensor
    num_bits: int

    def round(self, values_NK: torch.Tensor) -> torch.Tensor:
        """The nearest value on the grid, float32 [N, K]."""
        return _round(values_NK, self.steps_NK, self.zeros_NK, self.num_bits)


@dataclass(frozen=True)
class Curvature:
    """What feedback needs of a layer's inputs.

    Attributes:
        order_K: int64 channels in the order in which they are rounded.
        factor_KK: float32 U of the module's docstring, in that order.
    """

    order_K: torch.Tensor
    factor_KK: torch.Tensor


def half(values: torch.Tensor) -> torch.Tensor:
    """Values as float16 stores them, float32."""
    return values.half().float()


def symmetric_rows(values_NK: torch.Tensor, num_bits: int) -> Grid:
    """The min–max grid of each row: step 2 max|w| / (2^b − 1), zero at the code 2^(b − 1).

    This is the symmetric grid of GPTQ and DeltaZip; at 2 bits it holds {−2, −1, 0, 1} · step.
    """
    largest_N1 = values_NK.abs().amax(dim=1, keepdim=True)
    steps_N1 = half(2 * largest_N1 / (2**num_bits - 1))
    zeros_N1 = torch.full_like(steps_N1, 2 ** (num_bits - 1))
    return Grid(steps_N1.expand_as(values_NK), zeros_N1.expand_as(values_NK), num_bits)


def asymmetric_groups(values_NK: torch.Tensor, num_bits: int, group_size: int) -> Grid:
    """The min–max grid, of a step and a whole zero point, of each group of channels of each row."""
    rows, columns = values_NK.shape
    groups = -(-columns // group_size)
    padding = groups * group_size - columns
    # Zero is on every grid, so padding with it changes neither end.
    padded_NGC = torch.nn.functional.pad(values_NK, (0, padding)).view(rows, groups, group_size)
    low_NG = padded_NGC.amin(dim=2).clamp_max(0)
    high_NG = padded_NGC.amax(dim=2).clamp_min(0)
    top = 2**num_bits - 1
    steps_NG = half((high_NG - low_NG) / top)
    zeros_NG = (-low_NG * _inverse(steps_NG)).round_().clamp_(0, top)
    steps_NK = steps_NG.repeat_interleave(group_size, dim=1)[:, :columns]
    zeros_NK = zeros_NG.repeat_interleave(group_size, dim=1)[:, :columns]
    return Grid(steps_NK, zeros_NK, num_bits)


def curvature(moment_KK: torch.Tensor, by_energy: bool = False) -> Curvature:
    """The factor of the inverse of a second moment, with one percent damping.

    Args:
        moment_KK: E[x xᵀ], float32.
        by_energy: Round the channels with the largest E[x_j²] first, instead of from left to right.
    """
    order_K = torch.arange(len(moment_KK))
    if by_energy:
        order_K = moment_KK.diagonal().argsort(descending=True, stable=True)
    damped_KK = moment_KK[order_K][:, order_K].double()
    mean_energy = float(damped_KK.diagonal().mean())
    damped_KK.diagonal().add_(DAMPING * mean_energy if mean_energy > 0 else 1.0)
    # With both axes reversed M = L Lᵀ, so U is L⁻¹ reversed: one factorization instead of two.
    lower_KK = torch.linalg.cholesky(damped_KK.flip(0, 1))
    identity_KK = torch.eye(len(lower_KK), dtype=torch.float64)
    inverse_KK = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False)
    return Curvature(order_K, inverse_KK.flip(0, 1).float())


def feedback(
    values_NK: torch.Tensor, grid: Grid, inputs: Curvature, two_of_four: bool = False
) -> torch.Tensor:
    """Round every column to a grid, correcting later columns for the error of earlier ones.

    Args:
        values_NK: What to round, float32.
        grid: The grid of every weight, fixed beforehand.
        inputs: Curvature of the layer's inputs.
        two_of_four: Keep at most two of every four columns; needs the order from left to right.

    Returns:
        Values on the grid, float32 [N, K].
    """
    factor_KK = inputs.factor_KK
    # Columns as contiguous rows: the loop runs over them.
    todo_KN = values_NK.T[inputs.order_K].contiguous()
    steps_KN = grid.steps_NK.T[inputs.order_K].contiguous()
    zeros_KN = grid.zeros_NK.T[inputs.order_K].contiguous()
    diagonal_K = factor_KK.diagonal()
    kept_4N = torch.ones(4, todo_KN.shape[1], dtype=torch.bool)
    for start in range(0, len(todo_KN), BLOCK):
        stop = min(start + BLOCK, len(todo_KN))
        errors_BN = torch.empty(stop - start, todo_KN.shape[1])
        for j in range(start, stop):
            if two_of_four and j % 4 == 0:
                kept_4N = _largest_two(todo_KN[j : j + 4] / diagonal_K[j : j + 4, None])
            rounded_N = _round(todo_KN[j], steps_KN[j], zeros_KN[j], grid.num_bits)
            if two_of_four:
                rounded_N *= kept_4N[j % 4]
            error_N = torch.sub(todo_KN[j], rounded_N, out=errors_BN[j - start])
            error_N /= diagonal_K[j]
            todo_KN[j] = rounded_N
            todo_KN[j + 1 : stop].addr_(factor_KK[j, j + 1 : stop], error_N, alpha=-1)
        todo_KN[stop:].addmm_(factor_KK[start:stop, stop:].T, errors_BN, alpha=-1)
    rounded_KN = torch.empty_like(todo_KN).index_copy_(0, inputs.order_K, todo_KN)
    return rounded_KN.T.contiguous()


def _round(
    values: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, num_bits: int
) -> torch.Tensor:
    codes = (values * _inverse(steps)).add_(zeros).round_().clamp_(0, 2**num_bits - 1)
    return codes.sub_(zeros).mul_(steps)


def _inverse(steps: torch.Tensor) -> torch.Tensor:
    """1 / step, or zero for a grid that holds nothing but zero."""
    return torch.where(steps > 0, 1 / steps, 0.0)


def _largest_two(scores_4N: torch.Tensor) -> torch.Tensor:
    kept = scores_4N.abs().topk(min(2, len(scores_4N)), dim=0).indices
    return torch.zeros_like(scores_4N, dtype=torch.bool).scatter_(0, kept, True)
