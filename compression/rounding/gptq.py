"""Rounding with error feedback: GPTQ with the delta in place of the weight.

Channels are rounded one after the other; what a channel loses is made up for, as far as the inputs
are correlated, by the channels not yet rounded (Frantar et al. 2022, GPTQ, arXiv 2210.17323; Optimal
Brain Compression, arXiv 2208.11580). With H = E[x xᵀ], H⁻¹ = Uᵀ U and U upper triangular, rounding
channel j of a row w to q adds −(w_j − q)/U_jj · U_j,j+1: to the channels behind it, and costs the row
(w_j − q)²/U_jj² of output energy. 1/U_jj², the innovation of channel j, is what is left of it when the
channels behind it are known: under feedback it takes the place of E[x_j²] as a channel's importance.

U comes from one Cholesky factorization and one triangular inverse: with J the reversal of order,
J H J = L Lᵀ gives U = (J L J)⁻¹. Channels go in the order of falling E[x_j²] ("activation order").

Shapes: N output rows, K input channels.
"""

from dataclasses import dataclass

import torch

from deltamux.compression.rounding.quantize import Scheme

# Of the mean energy, added to the diagonal: GPTQ's own value; chosen, not measured here.
DAMPING = 0.01
# Channels between two updates of all that follow: a matter of speed, not of the result.
BLOCK = 32


@dataclass(frozen=True)
class Curvature:
    """How rounding errors of a linear's input channels reach its output.

    Attributes:
        order_K: The channels in the order of rounding, int64.
        factor_KK: U of the damped second moment in that order, float32.
        root_KK: U⁻¹, whose product with its transpose is the damped moment in that order, float32.
    """

    order_K: torch.Tensor
    factor_KK: torch.Tensor
    root_KK: torch.Tensor

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
    damping = DAMPING * mean if mean > 0 else 1.0
    while True:
        diagonal += damping
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not int(failed):
            break
        damping *= 10
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    root = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(root, identity, upper=True)
    return Curvature(order_K, inverse.float(), root.float())


def round_with_feedback(
    delta_NK: torch.Tensor,
    curvature: Curvature,
    grids: list[Grid],
    keep_NK: torch.Tensor | None = None,
    exact_K: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Round a delta to several grids at once.

    Args:
        delta_NK: The delta, float32.
        curvature: Of its inputs, on the same device.
        grids: What to round to; all are rounded in one pass.
        keep_NK: bool; where False the level is 0, and what that loses is fed back. Only for schemes
            that have a level 0.
        exact_K: bool; channels whose remainder is kept aside, so that nothing of them is lost.

    Returns:
        For every grid the levels c − z, float32 [N, K], and the remainders of the exact channels,
        float32 [N, channels], those in ascending order.
    """
    order_K = curvature.order_K
    rows, columns = delta_NK.shape
    work_KM = delta_NK[:, order_K].T.repeat(1, len(grids))
    state = _Pass(
        work_KM=work_KM,
        levels_KM=torch.empty_like(work_KM),
        steps_M=torch.cat([grid.steps_N for grid in grids]),
        rounding=_Rounding.of(grids, rows, delta_NK.device),
        keep_KM=None if keep_NK is None else keep_NK[:, order_K].T.repeat(1, len(grids)),
        exact=exact_K[order_K].tolist() if exact_K is not None else [False] * columns,
        remainders={},
    )
    for start in range(0, columns, BLOCK):
        state.round_block(curvature.factor_KK, start, min(start + BLOCK, columns))
    natural = torch.empty_like(order_K)
    natural[order_K] = torch.arange(columns, device=order_K.device)
    levels = state.levels_KM[natural].T.split(rows)
    places = natural.tolist()
    kept = [state.remainders[place] for place in places if place in state.remainders]
    stacked_SM = torch.stack(kept) if kept else work_KM[:0]
    return [
        (level.contiguous(), rest.T.contiguous())
        for level, rest in zip(levels, stacked_SM.split(rows, dim=1), strict=True)
    ]


@dataclass(frozen=True)
class _Pass:
    """A pass over all channels, in the order of rounding; M: the rows of all grids, one below the other."""

    work_KM: torch.Tensor
    levels_KM: torch.Tensor
    steps_M: torch.Tensor
    rounding: "_Rounding"
    keep_KM: torch.Tensor | None
    exact: list[bool]
    remainders: dict[int, torch.Tensor]

    def round_block(self, factor_KK: torch.Tensor, start: int, stop: int) -> None:
        """Round a block's channels one after the other; those behind the block are corrected once for all."""
        work_KM, steps_M = self.work_KM, self.steps_M
        inverse_M = torch.where(steps_M > 0, 1 / steps_M, 0.0)
        reciprocal_B = factor_KK.diagonal()[start:stop].reciprocal().tolist()
        errors_BM = torch.zeros(stop - start, work_KM.shape[1], device=work_KM.device)
        for j in range(start, stop):
            level_M = self.rounding.levels(work_KM[j] * inverse_M)
            if self.keep_KM is not None:
                level_M *= self.keep_KM[j]
            self.levels_KM[j] = level_M
            lost_M = torch.addcmul(work_KM[j], level_M, steps_M, value=-1)
            if self.exact[j]:
                self.remainders[j] = lost_M
                continue
            errors_BM[j - start] = lost_M.mul_(reciprocal_B[j - start])
            if j + 1 < stop:
                work_KM[j + 1 : stop].addr_(factor_KK[j, j + 1 : stop], lost_M, alpha=-1)
        if stop < len(work_KM):
            work_KM[stop:].addmm_(factor_KK[start:stop, stop:].T, errors_BM, alpha=-1)


@dataclass(frozen=True)
class _Rounding:
    """Nearest levels for the stacked rows of several grids."""

    offset_M: torch.Tensor
    lowest_M: torch.Tensor
    highest_M: torch.Tensor

    @classmethod
    def of(cls, grids: list[Grid], rows: int, device: torch.device) -> "_Rounding":
        def spread(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device).repeat_interleave(rows)

        zeros = [grid.scheme.zero_point for grid in grids]
        tops = [grid.scheme.levels - 1 - grid.scheme.zero_point for grid in grids]
        return cls(
            offset_M=spread([zero % 1 for zero in zeros]),
            lowest_M=spread([-zero for zero in zeros]),
            highest_M=spread(tops),
        )

    def levels(self, scaled_M: torch.Tensor) -> torch.Tensor:
        nearest_M = scaled_M.sub_(self.offset_M).round_().add_(self.offset_M)
        return torch.minimum(torch.maximum(nearest_M, self.lowest_M), self.highest_M)
