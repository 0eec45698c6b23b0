"""Rounding with error feedback: GPTQ with the delta in place of the weight.

Channels are rounded one after the other; what a channel loses is made up for, as far as the inputs
are correlated, by the channels not yet rounded (Frantar et al. 2022, GPTQ, arXiv 2210.17323; Optimal
Brain Compression, arXiv 2208.11580). With H = E[x xᵀ], H⁻¹ = Uᵀ U and U upper triangular, rounding
channel j of a row w to q adds −(w_j − q)/U_jj · U_j,j+1: to the channels behind it, and costs the row
(w_j − q)²/U_jj² of output energy: their sum is the row's share of tr(R H Rᵀ), R what is lost in the end. 1/U_jj², the innovation of channel j, is what is left of it when the
channels behind it are known: under feedback it takes the place of E[x_j²] as a channel's importance.

U comes from one Cholesky factorization and one triangular inverse: with J the reversal of order,
J H J = L Lᵀ gives U = (J L J)⁻¹. Channels go in the order of falling E[x_j²] ("activation order").

Shapes: N output rows, K input channels.
"""

from dataclasses import dataclass

import torch

from deltamux.compression.rounding.blocks import Block, Levels, channels_of_a_block, round_block
from deltamux.compression.rounding.quantize import Scheme

# Of the mean energy, added to the diagonal: GPTQ's own value; chosen, not measured here.
DAMPING = 0.01
# Triangles up to so large are inverted by LAPACK, larger ones by their quarters.
SMALL_TRIANGLE = 512


@dataclass(frozen=True)
class Curvature:
    """How rounding errors of a linear's input channels reach its output.

    Attributes:
        order_K: The channels in the order of rounding, int64.
        factor_KK: U of the damped second moment in that order, float32.
        root_KK: U⁻¹, whose product with its transpose is the damped moment in that order, float32.
        damping: What was added to the moment's diagonal.
    """

    order_K: torch.Tensor
    factor_KK: torch.Tensor
    root_KK: torch.Tensor
    damping: float

    def innovation_K(self) -> torch.Tensor:
        """1/U_jj², float32, in the channels' natural order."""
        innovation = torch.empty_like(self.factor_KK[0])
        innovation[self.order_K] = self.factor_KK.diagonal().reciprocal().square()
        return innovation


@dataclass(frozen=True)
class Grid:
    """The levels that one pass rounds to: a scheme and the step of every row, float32 [N]."""

    scheme: Scheme
    steps_N: torch.Tensor


@dataclass(frozen=True)
class Rounded:
    """A delta on one grid.

    Attributes:
        scheme: Of the grid.
        codes_NK: uint8.
        rest_NS: Remainders of the exact channels, float32, those in ascending order.
        lost: tr(R H Rᵀ) with the damped H and R what is lost, exact channels apart.
    """

    scheme: Scheme
    codes_NK: torch.Tensor
    rest_NS: torch.Tensor
    lost: float

    @property
    def levels_NK(self) -> torch.Tensor:
        """Levels c − z, float32."""
        return self.codes_NK.float().sub_(self.scheme.zero_point)


def curvature(moment_KK: torch.Tensor, name: str = "a linear") -> Curvature:
    """Factor a second moment.

    One per cent of the mean energy is added to the diagonal, ten times more as long as the factorization
    fails: fewer tokens than channels leave H singular.

    Args:
        moment_KK: E[x xᵀ], float32.
        name: Whose inputs they are, for the error.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    energy_K = moment_KK.diagonal()
    mean = float(energy_K.double().mean())
    if not torch.isfinite(moment_KK).all():
        raise ValueError(
            f"the second moments of the input of {name!r} hold NaN or infinity: the expert "
            "overflows on the calibration text; calibrate on other text or repair the checkpoint"
        )
    order_K = torch.argsort(energy_K, descending=True, stable=True)
    # A channel order and its reversal in one: J H J.
    reversed_K = order_K.flip(0)
    flipped = moment_KK[reversed_K][:, reversed_K].double()
    diagonal = flipped.diagonal()
    added = DAMPING * mean if mean > 0 else 1.0
    damping = 0.0
    while True:
        diagonal += added
        damping += added
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not int(failed):
            break
        added *= 10
    root = lower.flip(0, 1)
    return Curvature(order_K, _inverse(root).float(), root.float(), damping)


def _inverse(upper: torch.Tensor) -> torch.Tensor:
    """The inverse of an upper triangle, by its quarters: [[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]]."""
    size = len(upper)
    if size <= SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        small: torch.Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return small
    half = size // 2
    inverse = torch.zeros_like(upper)
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ upper[:half, half:]) @ last
    return inverse


def round_with_feedback(
    delta_NK: torch.Tensor,
    curvature: Curvature,
    grids: list[Grid],
    keep_NK: torch.Tensor | None = None,
    exact_K: torch.Tensor | None = None,
) -> list[Rounded]:
    """Round a delta to several grids at once.

    Args:
        delta_NK: The delta, float32.
        curvature: Of its inputs, on the same device.
        grids: What to round to; all are rounded in one pass.
        keep_NK: bool; where False the level is 0, and what that loses is fed back. Only for schemes
            that have a level 0.
        exact_K: bool; channels whose remainder is kept aside, so that nothing of them is lost.

    Returns:
        The delta on every grid.
    """
    order_K = curvature.order_K
    rows, columns = delta_NK.shape
    work_KM = delta_NK[:, order_K].T.repeat(1, len(grids))
    codes_KM = torch.empty(work_KM.shape, dtype=torch.uint8, device=delta_NK.device)
    keep_KM = None if keep_NK is None else keep_NK[:, order_K].T.repeat(1, len(grids))
    if exact_K is None:
        exact_K = torch.zeros(columns, dtype=torch.bool, device=order_K.device)
    levels = Levels.of([grid.scheme for grid in grids], torch.cat([g.steps_N for g in grids]))
    _round_channels(
        curvature.factor_KK, levels, Block(work_KM, codes_KM, exact_K[order_K], keep_KM)
    )
    natural = order_K.argsort()
    codes = codes_KM[natural].T.split(rows)
    rest_SM = work_KM[natural[exact_K]]  # what is left over of an exact channel stands in its place
    return [
        Rounded(grid.scheme, code.contiguous(), rest.T.contiguous(), float(lost_N.sum()))
        for grid, code, rest, lost_N in zip(
            grids, codes, rest_SM.split(rows, dim=1), levels.lost_M.split(rows), strict=True
        )
    ]


def _round_channels(factor_KK: torch.Tensor, levels: Levels, channels: Block) -> None:
    """Round all channels, block by block; those behind a block are corrected once for all of it."""
    work_KM = channels.work_BM
    size = channels_of_a_block(work_KM)
    for start in range(0, len(work_KM), size):
        part = slice(start, min(start + size, len(work_KM)))
        block = channels.part(part)
        errors_BM = round_block(block, factor_KK[part, part].contiguous(), levels)
        if part.stop < len(work_KM):
            work_KM[part.stop :].addmm_(factor_KK[part, part.stop :].T, errors_BM, alpha=-1)
