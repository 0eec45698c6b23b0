"""Low-rank rungs: the directions of a delta that its inputs feel, coded as two thin factors.

What fine-tuning means is in few directions; what rounding weights to 16 bit leaves in a delta is in all
of them (Delta-CoMe, Ping et al. 2024, arXiv 2406.08903, codes singular vectors at mixed widths). With
H = R Rᵀ and the singular values of Δ R = Σ_i u_i σ_i v_iᵀ, the best rank-r delta in output energy is

    Δ̂ = Û B ,   B = Uᵀ Δ   (rows of energy B H Bᵀ = diag σ²) .

Both factors are transform coded: with B and the columns of Û in the units of their σ_i, one step for all
coefficients shares the distortion out evenly (reverse water-filling, Cover & Thomas, section 10.3.3), wide
directions get more levels by themselves, and those below the step are dropped. B is rounded with error feedback
under H; Û is then solved for the rounded B, Û = Δ H Bᵀ G⁻¹ with G = B H Bᵀ, and rounded with
feedback under G, so that it makes up for what B lost. The product is rounded once more, to 4 bits a weight with
a step a row, because that is what a slot holds: a rounding far below what the factors leave out of most deltas.

Merged adapters are another matter: few directions hold all of their delta, and the slot's rounding is most of
what is lost. So where few directions suffice, finer steps are tried, and a sketch of the inputs is kept,
under which the reader rounds the product with error feedback (`noise_shaping.py`).

Shapes: N output rows, K input channels, r directions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from deltamux.compression.rounding.gptq import Curvature, Grid, curvature, round_with_feedback
from deltamux.compression.rounding.noise_shaping import InputSketch, shaped, sketch_inputs
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme, requantize

# Steps in units of the delta's deviation over inputs that are white.
FACTOR_STEPS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0)
# A direction pays for its N + K coefficients if its energy is above this share of their squared steps:
# their distortion, 1 / 12 each, and about a bit each at the slope 2 ln 2 / 12 of distortion over rate.
PAYING_ENERGY = 0.2
# A delta has few directions if those that an eighth of its coefficients pay for leave out no more than this.
FEW_DIRECTIONS = 1 / 8
FEW_DIRECTIONS_REST = 0.02
# A direction's width, as a share of the largest, below which its inputs are taken not to feel it.
UNFELT = 1e-5
# Finer steps, which pay where few directions hold all of a delta.
FINE_STEPS = (0.18, 0.25)
# Directions of a sketch of the inputs (0: none), and the steps it is tried with there: what coarse factors leave
# out outweighs what a slot's rounding does, of fine ones it is the other way round.
SKETCHES = {16: (0.0, 1.4), 4: (0.0, 2.0), 0: (1.0, math.inf)}


@dataclass(frozen=True)
class FactoredDelta:
    """A delta matrix [N, K] as a product of coded factors.

    Attributes:
        left: [N, r], one step for all rows: the scale of the product.
        right: [r, K], a step a row.
        inputs: What the product is rounded under for a slot; None: to the nearest codes.
    """

    left: QuantizedDelta
    right: QuantizedDelta
    inputs: InputSketch | None = None
    deflated: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Directions kept."""
        return self.left.shape[1]

    def codes(self) -> QuantizedDelta:
        """The product in 4-bit codes: the form that slots hold."""
        product_NK = self.left.dequantize() @ self.right.dequantize()
        return requantize(product_NK) if self.inputs is None else shaped(product_NK, self.inputs)

    def dequantize(self, factor: float = 1.0) -> torch.Tensor:
        """Δ̂, float32 [N, K], exactly as it is served, times a factor."""
        return self.codes().dequantize(factor)

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


def _whitened(delta_NK: torch.Tensor, inputs: Curvature) -> torch.Tensor:
    """Δ R: the delta over inputs that are white."""
    return delta_NK[:, inputs.order_K] @ inputs.root_KK


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
        few_directions: Whether those hold all of it: give finer steps and sketches of the inputs too.
    """
    rows, columns = delta_NK.shape
    white_NK = _whitened(delta_NK, inputs)
    energies_R, left_NR = _directions(white_NK)
    deviation = float((energies_R.sum() / (rows * columns)).sqrt())
    # A step of 1 in a white coordinate is this in a channel that others already explain in part.
    innovation = float(inputs.innovation_K().log().mean().exp().sqrt())
    steps = (*FINE_STEPS, *FACTOR_STEPS) if few_directions else FACTOR_STEPS
    sketches: dict[int, InputSketch | None] = {0: None}
    if few_directions:
        sketches |= {count: sketch_inputs(moment_KK, count) for count in SKETCHES if count}
    for multiple in steps:
        step = multiple * deviation
        rank = int((energies_R > PAYING_ENERGY * (rows + columns) * step**2).sum())
        if 0 < rank < min(rows, columns) // 2:
            right_RK = left_NR[:, :rank].T @ delta_NK
            levels_RK = _rounded(right_RK, inputs, step / innovation)
            levels_RK = levels_RK[levels_RK.any(dim=1)]
            if len(levels_RK):
                factored = _with_left(delta_NK, moment_KK, levels_RK, step, step / innovation)
                for count, sketch in sketches.items():
                    low, high = SKETCHES[count]
                    if not few_directions or low <= multiple <= high:
                        yield replace(factored, inputs=sketch)


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


def _rounded(values_NK: torch.Tensor, inputs: Curvature, step: float) -> torch.Tensor:
    steps_N = torch.full((len(values_NK),), step, device=values_NK.device)
    ((levels_NK, _),) = round_with_feedback(values_NK, inputs, [Grid(Scheme.INT8, steps_N)])
    return levels_NK


def _with_left(
    delta_NK: torch.Tensor,
    moment_KK: torch.Tensor,
    levels_RK: torch.Tensor,
    step: float,
    right_step: float,
) -> FactoredDelta:
    """Solve the left factor for rounded right levels, and round it too."""
    seen_RK = levels_RK @ moment_KK * right_step
    gram_RR = seen_RK @ levels_RK.T * right_step
    # Of a direction that the inputs never take, rounding alone is left, of either sign.
    widths_R = gram_RR.diagonal().clamp_min(0).sqrt()
    widths_R = widths_R.clamp_min(float(UNFELT * widths_R.max()) or 1.0)
    unit_RR = gram_RR / widths_R / widths_R.unsqueeze(1)
    target_RN = (seen_RK @ delta_NK.T) / widths_R.unsqueeze(1)
    ridge_RR = unit_RR.double() + 1e-6 * torch.eye(len(unit_RR), device=unit_RR.device)
    left_NR = torch.linalg.solve(ridge_RR, target_RN.double()).float().T.contiguous()
    levels_NR = _rounded(left_NR, curvature(unit_RR), step)
    right_steps_R = step * right_step / widths_R
    return FactoredDelta(
        left=QuantizedDelta.from_levels(
            Scheme.INT8, levels_NR, torch.ones(len(levels_NR)), deflated=True
        ),
        right=QuantizedDelta.from_levels(Scheme.INT8, levels_RK, right_steps_R, deflated=True),
    )
