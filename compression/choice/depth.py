"""Rates that fall, or rise, in an arithmetic progression over depth.

ATP (Huang et al., ICML 2025, "Determining Layer-Wise Sparsity for Large Language Models Through a
Theoretical Perspective", arXiv 2502.14770): errors of early layers are amplified by all later ones,
so sparsity rises with depth i by a common difference β around the mean p̄,

    p_i = p̄ + β (i − (L − 1) / 2) ,     β (L − 1) ≤ min(2 p̄, 2 (1 − p̄)) ,

and one hyperparameter, β, is found by a few trials. In bits per weight of the delta, with mean m,

    m_i = m (1 − τ x_i) ,     x_i = 2 i / (L − 1) − 1 ,     β = 2 τ m / (L − 1) .

The tilt τ is β made independent of the budget: positive takes from the deep layers, as ATP does, and
at 1 nothing would be left for the last. Both signs are tried, because a delta need not behave as
weights do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from deltamux.compression.choice.knapsack import knapsack
from deltamux.compression.choice.problem import Choice, Curve, Objective
from deltamux.compression.choice.uniform import largest_fit

# By size: of equally good tilts the first, and so the most even allocation, is kept. Steps chosen, not measured.
TILTS = (0.0, 0.2, -0.2, 0.4, -0.4, 0.6, -0.6, 0.8, -0.8)


def atp(
    curves: Sequence[Curve],
    budget_bytes: int,
    objective: Objective,
    tilts: Sequence[float] = TILTS,
) -> Choice:
    """Layer-wise rates in the progression whose tilt does best; a layer's matrices share its rate.

    Args:
        curves: One per matrix, without dominated rungs.
        budget_bytes: Upper bound of the total; every trial comes as close as a common rate can.
        objective: Measured once per tilt.
        tilts: The τ to try, above −1 and below 1.
    """
    return _best(lambda tilt: progression(curves, budget_bytes, tilt), objective, tilts)


def knapsack_atp(
    curves: Sequence[Curve],
    budget_bytes: int,
    objective: Objective,
    tilts: Sequence[float] = TILTS,
) -> Choice:
    """The knapsack with importances multiplied by the progression whose tilt does best.

    It differs from `knapsack` only under an objective of its own: by the predicted loss, which knows
    no depth, a tilt can win no more than the gain of a single step.

    Args:
        curves: One per matrix.
        budget_bytes: Upper bound of the total.
        objective: Measured once per tilt, for instance the divergence of the compressed model.
        tilts: The τ to try, above −1 and below 1.
    """

    def tilted(tilt: float) -> Choice:
        return knapsack(
            [
                replace(curve, importance=curve.importance * factor)
                for curve, factor in zip(curves, depth_factors(curves, tilt), strict=True)
            ],
            budget_bytes,
        )

    return _best(tilted, objective, tilts)


def progression(curves: Sequence[Curve], budget_bytes: int, tilt: float) -> Choice:
    """The progression of this tilt with the largest mean rate that fits the budget."""
    factors = depth_factors(curves, tilt)
    shares = [c.num_weights * factor for c, factor in zip(curves, factors, strict=True)]
    ladders = [[rung.num_bytes for rung in curve.rungs] for curve in curves]
    return largest_fit(ladders, shares, budget_bytes)


def depth_factors(curves: Sequence[Curve], tilt: float) -> list[float]:
    """1 − τ x of every curve's layer; a model of one layer has no depth to tilt over."""
    layers = [curve.layer for curve in curves]
    first, span = min(layers, default=0), max(layers, default=0) - min(layers, default=0)
    return [1 - tilt * (2 * (layer - first) / span - 1) if span else 1.0 for layer in layers]


def _best(
    choice_at: Callable[[float], Choice], objective: Objective, tilts: Sequence[float]
) -> Choice:
    return min((choice_at(tilt) for tilt in tilts), key=objective)
