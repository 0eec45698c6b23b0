"""Low-rank rungs: the directions of a delta that its inputs feel, coded as two thin factors.

What fine-tuning means is in few directions; what rounding weights to 16 bit leaves in a delta is in all
of them (Delta-CoMe, Ping et al. 2024, arXiv 2406.08903, codes singular vectors at mixed widths). With
H = R Rᵀ and the singular values of Δ R = Σ_i u_i σ_i v_iᵀ, the best rank-r delta in output energy is

    Δ̂ = Û B ,   B = Uᵀ Δ   (rows of energy B H Bᵀ = diag σ²) .

Both factors are transform coded: with B and the columns of Û in the units of their σ_i, one step for all
coefficients shares the distortion out evenly (reverse water-filling, Cover & Thomas, section 10.3.3), wide
directions get more levels by themselves, and those below the step are dropped. B is rounded with error feedback
under H; Û is then solved for the rounded B, Û = Δ H Bᵀ G⁻¹ with G = B H Bᵀ, and rounded with
feedback under G, so that it makes up for what B lost. A slot holds the factors as they are.

Few directions hold all of the delta of a merged adapter: there finer steps are tried too.

Shapes: N output rows, K input channels, r directions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from deltamux.compression.image.cut import Cut
from deltamux.compression.rounding.gptq import Curvature, Grid, curvature, round_with_feedback
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme

# Steps in units of the delta's deviation over inputs that are white; chosen, not measured.
FACTOR_STEPS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0)
# Finer steps, which pay where few directions hold all of a delta. In a rank-16 delta merged into bfloat16 (q_proj
# and down_proj of a layer of SmolLM2-135M) 0.25 leaves 0.26 and 0.27 % of the output energy at 0.52 and 0.31 bits,
# 0.09 leaves 0.19 and 0.24 % at 0.78 and 0.49; 0.06 next to no less.
FINE_STEPS = (0.09, 0.13, 0.18, 0.25)
# A direction pays for its N + K coefficients if its energy is above this share of their squared steps:
# their distortion, 1 / 12 each, and about a bit each at the slope 2 ln 2 / 12 of distortion over rate.
PAYING_ENERGY = 0.2
# The level that a direction's largest coefficient is to have at most: feedback adds to it.
FARTHEST_LEVEL = 120
# Directions that a slot takes by default (`slot.rank`).
MOST_DIRECTIONS = 64
# A delta has few directions if those that an eighth of its coefficients pay for leave out no more than this; chosen,
# not measured.
FEW_DIRECTIONS = 1 / 8
FEW_DIRECTIONS_REST = 0.02
# A direction's width, as a share of the largest, below which its inputs are taken not to feel it; chosen, not measured.
UNFELT = 1e-5


@dataclass(frozen=True)
class FactoredDelta:
    """A delta matrix [N, K] as a product of coded factors.

    Attributes:
        left: [N, r], one step for all rows: the scale of the product.
        right: [r, K], a step a row.
    """

    left: QuantizedDelta
    right: QuantizedDelta

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Directions kept."""
        return self.left.shape[1]

    def part(self, cut: Cut) -> "FactoredDelta":
        """The rows and channels of a cut: left has the rows, right the channels."""
        return FactoredDelta(
            self.left.part(Cut(rows=cut.rows)), self.right.part(Cut(channels=cut.channels))
        )

    def largest(self) -> torch.Tensor:
        """A bound of |Δ̂|, one number; not finite where a step is not."""
        return self.left.largest() * self.right.largest() * self.rank

    def dequantize(self, factor: float = 1.0) -> torch.Tensor:
        """Δ̂, float32 [N, K], times a factor."""
        return self.left.dequantize(factor) @ self.right.dequantize()

    def scaled(self, factor: float) -> "FactoredDelta":
        """The same times a factor.

        In the one step of the left factor: rounding the many of the right one would move the product.
        """
        return replace(self, left=self.left.scaled(factor))


def has_few_directions(delta_NK: torch.Tensor, inputs: Curvature) -> bool:
    """Whether few directions hold a delta's output energy, as those of a merged adapter do.

    Their energy is bounded from below by a random sketch with one power iteration (Halko et al. 2011,
    arXiv 0909.4061).

    Args:
        delta_NK: The delta, float32, not all zero.
        inputs: Curvature of its inputs.
    """
    rows, columns = delta_NK.shape
    count = max(1, int(FEW_DIRECTIONS * rows * columns / (rows + columns)))
    white_NK = _whitened(delta_NK, inputs)
    generator = torch.Generator(white_NK.device).manual_seed(0)
    sketch_KC = torch.randn(columns, count, generator=generator, device=white_NK.device)
    leading_NC = torch.linalg.qr(white_NK @ (white_NK.T @ (white_NK @ sketch_KC))).Q
    held = (leading_NC.T @ white_NK).square().sum()
    return bool(held >= (1 - FEW_DIRECTIONS_REST) * white_NK.square().sum())


def factored_rungs(
    delta_NK: torch.Tensor,
    moment_KK: torch.Tensor,
    inputs: Curvature,
    few_directions: bool = False,
) -> Iterator[FactoredDelta]:
    """Low-rank rungs from fine to coarse; steps at which nothing pays, or everything does, are left out.

    Args:
        delta_NK: The delta, float32.
        moment_KK: E[x xᵀ] of its inputs, float32.
        inputs: Its curvature.
        few_directions: Whether those hold all of it: give finer steps too.
    """
    rows, columns = delta_NK.shape
    white_NK = _whitened(delta_NK, inputs)
    energies_R, left_NR = _directions(white_NK)
    deviation = float((energies_R.sum() / (rows * columns)).sqrt())
    # A step of 1 in a white coordinate is this in a channel that others already explain in part.
    innovation = float(inputs.innovation_K().log().mean().exp().sqrt())
    for multiple in (*FINE_STEPS, *FACTOR_STEPS) if few_directions else FACTOR_STEPS:
        step = multiple * deviation
        paying = int((energies_R > PAYING_ENERGY * (rows + columns) * step**2).sum())
        rank = min(paying, MOST_DIRECTIONS)
        if 0 < rank < min(rows, columns) // 2:
            right_RK = left_NR[:, :rank].T @ delta_NK
            steps = step, step / innovation
            factored = _with_left(delta_NK, moment_KK, right_RK, inputs, steps)
            if factored is not None:
                yield factored


def _whitened(delta_NK: torch.Tensor, inputs: Curvature) -> torch.Tensor:
    """Δ R: the delta over inputs that are white."""
    return delta_NK[:, inputs.order_K] @ inputs.root_KK


def _directions(white_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values, falling, and left singular vectors; from the smaller Gram matrix."""
    rows, columns = white_NK.shape
    wide = white_NK.double()
    if rows <= columns:
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        return values.flip(0).clamp_min(0).float(), vectors.flip(1).float()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left = wide @ vectors / values.sqrt().clamp_min(1e-30)
    return values.float(), left.float()


def _of_width_one(gram_RR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of directions scaled to a diagonal of ones, and the widths that were taken out, float32 [R]."""
    # Of a direction that the inputs never take, rounding alone is left, of either sign.
    widths_R = gram_RR.diagonal().clamp_min(0).sqrt()
    widths_R = widths_R.clamp_min(float(UNFELT * widths_R.max()) or 1.0)
    return gram_RR / widths_R / widths_R.unsqueeze(1), widths_R


def _with_left(
    delta_NK: torch.Tensor,
    moment_KK: torch.Tensor,
    right_RK: torch.Tensor,
    inputs: Curvature,
    steps: tuple[float, float],
) -> FactoredDelta | None:
    """Round right factors, solve the left one for them, and round it too; None where nothing of the right one is left.

    Args:
        delta_NK: The delta.
        moment_KK: E[x xᵀ] of its inputs.
        right_RK: The right factor.
        inputs: Curvature of the inputs.
        steps: Of the left and of the right factor; wider where a direction's levels would not suffice.
    """
    step, right_step = steps
    right_steps_R = _reaching(right_RK, right_step)
    levels_RK = _rounded(right_RK, inputs, right_steps_R)
    kept_R = levels_RK.any(dim=1)
    levels_RK, right_steps_R = levels_RK[kept_R], right_steps_R[kept_R]
    if len(levels_RK) == 0:
        return None
    seen_RK = (levels_RK * right_steps_R.unsqueeze(1)) @ moment_KK
    unit_RR, widths_R = _of_width_one(seen_RK @ levels_RK.T * right_steps_R)
    target_RN = (seen_RK @ delta_NK.T) / widths_R.unsqueeze(1)
    ridge_RR = unit_RR.double() + 1e-6 * torch.eye(len(unit_RR), device=unit_RR.device)
    left_RN = torch.linalg.solve(ridge_RR, target_RN.double()).float()
    # A direction's step in the left factor is free as well: the right factor's takes it up.
    left_steps_R = _reaching(left_RN, step)
    left_NR = (left_RN / left_steps_R.unsqueeze(1)).T.contiguous()
    stepped_RR = unit_RR * left_steps_R * left_steps_R.unsqueeze(1) / step**2
    ones_N = torch.ones(len(left_NR), device=left_NR.device)
    levels_NR = _rounded(left_NR, curvature(stepped_RR), ones_N)
    product_steps_R = left_steps_R * right_steps_R / widths_R
    return FactoredDelta(
        left=QuantizedDelta.from_levels(Scheme.INT8, levels_NR, ones_N),
        right=QuantizedDelta.from_levels(Scheme.INT8, levels_RK, product_steps_R),
    )


def _reaching(values_RK: torch.Tensor, step: float) -> torch.Tensor:
    """A step for every row that reaches its largest value, float32 [R]."""
    return (values_RK.abs().amax(dim=1) / FARTHEST_LEVEL).clamp_min(step)


def _rounded(values_NK: torch.Tensor, inputs: Curvature, steps_N: torch.Tensor) -> torch.Tensor:
    (rounded,) = round_with_feedback(values_NK, inputs, [Grid(Scheme.INT8, steps_N)])
    return rounded.levels_NK
