"""The ways to compress one linear's delta: a ladder of rates with their real bytes and errors.

Entropy-coded rungs round to one uniform step for the whole matrix and leave the rate to the entropy
code: at low rates most codes are zero and cost next to nothing, at high rates a uniform quantizer
under an entropy code is within a quarter bit of any other (Gish & Pierce 1968). Equal steps are also what
minimises the summed error of a matrix at its bytes: every row and channel then pays the same price
for its last bit. Fixed-width rungs round to row steps that minimise the error, and their scales are
refitted in closed form, s = (Δ H q) / (q H q).

Either way rounding loses more of the delta than it adds: the reconstruction of least squares is a
shrunken delta, ⟨Δ̂, Δ⟩ < ⟨Δ, Δ⟩ in the metric of H. What is left over points against the fine-tuning in
every matrix alike, and adds up over all of them, while the rest of the error is noise that averages
out. So the matrix is stretched by ⟨Δ, Δ⟩ / ⟨Δ̂, Δ⟩ until nothing of the delta itself is missing. This
raises the squared error a little and lowers the divergence of the model's predictions several times.

Shapes: N output rows, K input channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from deltamux.compression.pruning.scores import Pattern, Score, keep_mask
from deltamux.compression.rounding.gptq import Curvature, Grid, Rounded, round_with_feedback
from deltamux.compression.rounding.low_rank import FactoredDelta, factored_rungs
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme, search_steps

# Steps of the entropy-coded rungs in units of the delta's effective deviation, about √2 apart: chosen, not measured.
# The coarser the step, the fewer levels are in use, and the longer runs of zeros one symbol of the entropy code holds.
CODED_STEPS = (
    (Scheme.INT4, (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)),
    (Scheme.QUINARY, (2.8,)),
    (Scheme.TERNARY, (2.8, 4.0, 4.8, 5.6, 6.7, 8.0)),
)
# Wider steps of the 16 levels, as far as the largest element needs them: where a few channels or
# elements stand far out, all other rungs would cut off what most of the delta's energy is in.
REACHING_STEPS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
# Elements of all grids that one pass rounds: 1 GiB of float32.
PASS_ELEMENTS = 2**28
# Shares of elements that a pruned ladder drops, and the step that the others are rounded with; chosen, not measured.
SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
PRUNED_STEP = 1.4
# Under feedback a row's best step is wider than its best one alone: the rows spread while they wait. Both are tried.
FEEDBACK_WIDTHS = (1.0, 1.2)
# Nothing is stretched further: a matrix of which this little survives is better left alone; chosen, not measured.
MAX_STRETCH = 2.0


@dataclass(frozen=True)
class Linear:
    """A linear's delta and what its inputs look like.

    Attributes:
        delta_NK: float32.
        moment_KK: E[x xᵀ] as served, float32.
        curvature: Of that moment.
    """

    delta_NK: torch.Tensor
    moment_KK: torch.Tensor
    curvature: Curvature

    def of_rows(self, index: torch.Tensor) -> "Linear":
        """Some of its rows, int64."""
        return Linear(self.delta_NK[index].contiguous(), self.moment_KK, self.curvature)

    @cached_property
    def weighted_NK(self) -> torch.Tensor:
        """Δ H."""
        return self.delta_NK @ self.moment_KK

    @cached_property
    def square(self) -> float:
        """‖Δ‖²."""
        return float(torch.dot(self.delta_NK.flatten(), self.delta_NK.flatten()))

    @cached_property
    def energy(self) -> float:
        """Σ_i (Δ H Δᵀ)_ii: the delta's output energy, which rounding could leave below zero."""
        return max(self.overlap(self.delta_NK), 0.0)

    def overlap(self, other_NK: torch.Tensor) -> float:
        """Σ_i (Δ H Δ̂ᵀ)_ii."""
        return float(torch.dot(self.weighted_NK.flatten(), other_NK.flatten()))

    def lost(self, other_NK: torch.Tensor) -> float:
        """The share of the delta's output energy that is lost with another delta in its place."""
        rest_NK = self.delta_NK - other_NK
        lost = torch.dot((rest_NK @ self.moment_KK).flatten(), rest_NK.flatten())
        return max(float(lost), 0.0) / max(self.energy, 1e-38)

    def deviation(self) -> float:
        """Root mean square of the delta, channels weighted by their energy."""
        energy_K = self.moment_KK.diagonal()
        mean = (self.delta_NK.square() @ energy_K).mean() / energy_K.sum().clamp_min(1e-38)
        return float(mean.sqrt()) or float(self.delta_NK.square().mean().sqrt())


class Rung(NamedTuple):
    """A linear's delta in one of its ways.

    Attributes:
        delta: What is stored.
        error: The share of the delta's output energy that is lost.
    """

    delta: QuantizedDelta
    error: float


def coded_steps(linear: Linear) -> list[tuple[Scheme, float]]:
    """Levels and step of every entropy-coded rung, from fine to coarse."""
    unit = linear.deviation()
    steps = [(scheme, step * unit) for scheme, steps in CODED_STEPS for step in steps]
    highest = Scheme.INT4.levels - 1 - Scheme.INT4.zero_point
    largest = float(linear.delta_NK.abs().max())
    return steps + [
        (Scheme.INT4, step * unit) for step in REACHING_STEPS if step / 2 * unit * highest < largest
    ]


def coded_rungs(
    linear: Linear, steps: Sequence[tuple[Scheme, float]] | None = None
) -> Iterator[Rung | None]:
    """Entropy-coded rungs; as many are rounded in one pass as memory allows.

    Args:
        linear: The delta.
        steps: Levels and steps; None: those of `coded_steps`.

    Yields:
        One for each step, None where nothing of the delta is left.
    """
    grids = [_flat_grid(linear, *each) for each in steps or coded_steps(linear)]
    at_once = max(1, PASS_ELEMENTS // linear.delta_NK.numel())
    for start in range(0, len(grids), at_once):
        some = grids[start : start + at_once]
        rounded = round_with_feedback(linear.delta_NK, linear.curvature, some)
        for grid, each in zip(some, rounded, strict=True):
            yield _coded(linear, grid, each)


def low_rank_rungs(linear: Linear, few_directions: bool = False) -> Iterator[FactoredDelta]:
    """Rungs of few directions, from fine to coarse, stretched like the others.

    Args:
        linear: The delta.
        few_directions: Whether those hold all of the delta.
    """
    rungs = factored_rungs(
        linear.delta_NK, linear.moment_KK, linear.curvature, few_directions=few_directions
    )
    for factored in rungs:
        overlap = linear.overlap(factored.dequantize().to(linear.delta_NK.device))
        if overlap > 0:
            yield factored.scaled(_bounded(linear.energy / overlap))


def pruned_rungs(linear: Linear, score: Score, pattern: Pattern) -> Iterator[Rung | None]:
    """Entropy-coded rungs at one step, whose rates differ by the share of elements dropped."""
    grid = _flat_grid(linear, Scheme.QUINARY, PRUNED_STEP * linear.deviation())
    innovation_K = linear.curvature.innovation_K()
    sparsities = (0.5,) if pattern is Pattern.N_M else SPARSITIES
    for sparsity in sparsities:
        keep_NK = keep_mask(
            linear.delta_NK,
            linear.moment_KK.diagonal(),
            innovation_K,
            score=score,
            pattern=pattern,
            sparsity=sparsity,
        )
        (rounded,) = round_with_feedback(linear.delta_NK, linear.curvature, [grid], keep_NK=keep_NK)
        yield _coded(linear, grid, rounded)


def fixed_rung(linear: Linear, scheme: Scheme, salient_channels: int) -> QuantizedDelta:
    """Codes of a fixed width with row steps, and the most important channels in 16 bit.

    A channel's importance is ‖Δ_j‖² / U_jj², what it would cost to drop it under feedback.
    """
    delta_NK, energy_K = linear.delta_NK, linear.moment_KK.diagonal()
    importance_K = delta_NK.square().sum(dim=0) * linear.curvature.innovation_K()
    count = min(salient_channels, int((importance_K > 0).sum()))
    salient_S = importance_K.topk(count).indices.sort().values
    exact_K = torch.zeros_like(energy_K, dtype=torch.bool)
    exact_K[salient_S] = True
    weights_K = energy_K / energy_K.mean().clamp_min(torch.finfo(torch.float32).tiny)
    steps_N = search_steps(delta_NK, scheme, weights_K.masked_fill(exact_K, 0.0))
    grids = [Grid(scheme, steps_N * width) for width in FEEDBACK_WIDTHS]
    found = []
    passes = round_with_feedback(delta_NK, linear.curvature, grids, exact_K=exact_K)
    for grid, rounded in zip(grids, passes, strict=True):
        levels_NK, rest_NS = rounded.levels_NK, rounded.rest_NS
        kept_NK = torch.zeros_like(delta_NK)
        kept_NK[:, salient_S] = rest_NS
        fitted_N = _refit(linear, levels_NK, grid.steps_N, delta_NK - kept_NK)
        quantized = QuantizedDelta.from_levels(scheme, levels_NK, fitted_N)
        if count:
            quantized = replace(
                quantized,
                salient_channels_S=salient_S.cpu(),
                salient_values_NS=rest_NS.to("cpu", torch.bfloat16),
            )
        found.append(quantized)
    best = min(found, key=lambda q: linear.lost(q.dequantize().to(delta_NK.device)))
    return _stretched(linear, best)


def _flat_grid(linear: Linear, scheme: Scheme, step: float) -> Grid:
    rows = linear.delta_NK.shape[0]
    return Grid(scheme, torch.full((rows,), step, device=linear.delta_NK.device))


def _coded(linear: Linear, grid: Grid, rounded: Rounded) -> Rung | None:
    """A delta on one step, stretched, and its error from what the pass has lost: E = tr(R H Rᵀ), R = Δ − Δ̂.

    With e = ⟨Δ, Δ⟩ and o = ⟨Δ̂, Δ⟩ is ⟨Δ̂, Δ̂⟩ = E − e + 2 o, so that the error of (1 + d) Δ̂ is

        E + 2 d (E − e + o) + d² (E − e + 2 o) .
    """
    levels, step = rounded.levels_NK.flatten(), float(grid.steps_N[0])
    square = float(torch.dot(levels, levels))
    if square == 0:
        return None
    product = float(torch.dot(levels, linear.delta_NK.flatten()))
    rest = linear.square - 2 * step * product + step**2 * square
    lost = rounded.lost - linear.curvature.damping * rest
    energy, overlap = linear.energy, step * linear.overlap(levels)
    stretch = _bounded(energy / overlap) if overlap > 0 and energy > 0 else 1.0
    stored = torch.tensor([step * stretch]).bfloat16()
    d = float(stored) / step - 1
    error = lost + 2 * d * (lost - energy + overlap) + d**2 * (lost - energy + 2 * overlap)
    shape = rounded.codes_NK.shape[0], rounded.codes_NK.shape[1]
    coded = QuantizedDelta(grid.scheme, shape, rounded.codes_NK.cpu(), stored.expand(shape[0]))
    return Rung(coded, max(error, 0.0) / max(energy, 1e-38))


def _refit(
    linear: Linear, levels_NK: torch.Tensor, steps_N: torch.Tensor, target_NK: torch.Tensor
) -> torch.Tensor:
    """The row scales of least output error for given levels; a row without levels keeps its own."""
    weighted_NK = levels_NK @ linear.moment_KK
    square_N = (weighted_NK * levels_NK).sum(dim=1)
    product_N = (weighted_NK * target_NK).sum(dim=1)
    return torch.where(square_N > 0, product_N / square_N.clamp_min(1e-38), steps_N).clamp_min(0)


def _stretched(linear: Linear, quantized: QuantizedDelta) -> QuantizedDelta:
    """The steps times ⟨Δ, Δ⟩ / ⟨Δ̂, Δ⟩; what is kept in 16 bit stays."""
    device = linear.delta_NK.device
    overlap = linear.overlap(quantized.without_salient().dequantize().to(device))
    wanted = linear.energy
    if quantized.salient_channels_S is not None:
        wanted -= linear.overlap(quantized.dequantize().to(device)) - overlap
    if overlap <= 0 or wanted <= 0:
        return quantized
    return quantized.scaled(_bounded(wanted / overlap))


def _bounded(stretch: float) -> float:
    return min(max(stretch, 1 / MAX_STRETCH), MAX_STRETCH)
