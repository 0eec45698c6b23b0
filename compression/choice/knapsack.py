"""The budget as a knapsack: the rungs with the least predicted loss.

On its lower convex hull every curve is a list of steps up whose gain per byte falls. Taking the steps
of all curves in that order, a prefix is the exact optimum Σ w e + λ Σ b for one Lagrange multiplier λ
(Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans.
ASSP 36(9)); searching the prefix is bisecting λ. That predicted losses of matrices add up is
the linearity theorem of HIGGS (Malinovskii et al., NAACL 2025), which solves the same problem by
dynamic programming.

What the last step leaves of the budget is filled by smaller steps. A greedy fill that takes what fits
can end worse for a larger budget, because it starts from another prefix. So the fill is the best of a
family of allocations that does not depend on the budget, of which a larger budget admits more: the
predicted loss never rises with the budget.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltamux.compression.choice.problem import (
    Choice,
    Curve,
    keep_rungs,
    pareto_front,
    predicted_loss,
    total_bytes,
    total_slot_bytes,
)
from deltamux.compression.choice.uniform import uniform

Number = TypeVar("Number", np.int64, np.float64)


class Step(NamedTuple):
    """From one rung of a curve's convex hull to the next.

    Attributes:
        curve: Index of the curve.
        rung: Index of the rung that the step leads to.
        num_bytes: What it costs.
        gain: By how much the predicted loss falls.
        gain_per_byte: Their quotient.
    """

    curve: int
    rung: int
    num_bytes: int
    gain: float
    gain_per_byte: float


def knapsack(curves: Sequence[Curve], budget_bytes: int) -> Choice:
    """The rungs of least predicted loss, up to the gain of one step.

    The predicted loss is never above that of `uniform`, and never rises with the budget.

    Args:
        curves: One per matrix; dominated rungs are passed over.
        budget_bytes: Upper bound of the total, 0 or more.
    """
    fronts = [pareto_front(curve) for curve in curves]
    pruned = [keep_rungs(curve, front) for curve, front in zip(curves, fronts, strict=True)]
    steps = hull_steps(pruned)
    candidates = [_prefix_and_fill(steps, len(curves), budget_bytes), uniform(pruned, budget_bytes)]
    best = min(candidates, key=lambda choice: predicted_loss(pruned, choice))
    return [front[rung] for front, rung in zip(fronts, best, strict=True)]


def convex_hull(curve: Curve) -> list[int]:
    """Indices of the rungs on the lower convex hull of a curve without dominated rungs."""
    hull = [0]
    for rung in range(1, len(curve.rungs)):
        while len(hull) > 1 and _slope(curve, hull[-1], rung) >= _slope(curve, *hull[-2:]):
            hull.pop()
        hull.append(rung)
    return hull


def hull_steps(curves: Sequence[Curve]) -> list[Step]:
    """The steps of all convex hulls, the most gain per byte first, each curve's in its order."""
    steps = []
    for index, curve in enumerate(curves):
        hull = convex_hull(curve)
        for low, high in pairwise(hull):
            below, above = curve.rungs[low], curve.rungs[high]
            gain = curve.importance * (below.error - above.error)
            slope = curve.importance * _slope(curve, low, high)
            steps.append(Step(index, high, above.num_bytes - below.num_bytes, gain, slope))
    return sorted(steps, key=lambda step: -step.gain_per_byte)


def fill(
    curves: Sequence[Curve],
    choice: Choice,
    budget_bytes: int,
    slot_bytes: int | None = None,
) -> Choice:
    """Spend what a choice leaves of the budget: the best gain per byte first, until nothing fits.

    Args:
        curves: One per matrix, without dominated rungs.
        choice: A start within the budget.
        budget_bytes: Upper bound of the total.
        slot_bytes: Upper bound of the total in a slot, if there is one.
    """
    filled = list(choice)
    left = budget_bytes - total_bytes(curves, choice)
    room = math.inf if slot_bytes is None else slot_bytes - total_slot_bytes(curves, choice)
    while True:
        moves = [
            (curve.importance * (rung.error - other.error) / extra, -extra, index, target)
            for index, curve in enumerate(curves)
            for rung in [curve.rungs[filled[index]]]
            for target, other in enumerate(curve.rungs[filled[index] + 1 :], filled[index] + 1)
            if (extra := other.num_bytes - rung.num_bytes) <= left
            and other.slot_bytes - rung.slot_bytes <= room
            and other.error < rung.error
        ]
        if not moves:
            return filled
        _, negative_extra, index, target = max(moves)
        rungs = curves[index].rungs
        room -= rungs[target].slot_bytes - rungs[filled[index]].slot_bytes
        filled[index] = target
        left += negative_extra


def _slope(curve: Curve, low: int, high: int) -> float:
    below, above = curve.rungs[low], curve.rungs[high]
    return (below.error - above.error) / (above.num_bytes - below.num_bytes)


def _prefix_and_fill(steps: list[Step], num_curves: int, budget_bytes: int) -> Choice:
    """The best of all prefixes of the steps, each followed by the next small steps that fit.

    A step is small if it and the steps of the same curve before it cost at most `limit`; of these, in
    order, all are taken up to the first that no longer fits. All limits that matter are tried.
    """
    sizes_K = np.array([step.num_bytes for step in steps], dtype=np.int64)
    gains_K = np.array([step.gain for step in steps], dtype=np.float64)
    largest_K = _largest_so_far(steps)
    prefix_bytes = _cumulative(sizes_K)
    prefix_gain = _cumulative(gains_K)
    starts = np.flatnonzero(prefix_bytes <= budget_bytes)
    best_gain, best_taken_K = -1.0, np.zeros(len(steps), dtype=bool)
    for limit in [0, *np.unique(largest_K)]:
        small_K = largest_K <= limit
        small_bytes = _cumulative(sizes_K * small_K)
        small_gain = _cumulative(gains_K * small_K)
        reach = budget_bytes - prefix_bytes[starts] + small_bytes[starts]
        stops = np.searchsorted(small_bytes, reach, side="right") - 1
        gain = prefix_gain[starts] + small_gain[stops] - small_gain[starts]
        best = int(gain.argmax())
        if gain[best] > best_gain:
            position_K = np.arange(len(steps))
            best_gain = float(gain[best])
            best_taken_K = position_K < starts[best]
            best_taken_K |= small_K & (position_K < stops[best])
    choice = [0] * num_curves
    for position in np.flatnonzero(best_taken_K):
        choice[steps[position].curve] = steps[position].rung
    return choice


def _largest_so_far(steps: list[Step]) -> NDArray[np.int64]:
    """For every step the most bytes of it and the steps of the same curve before it."""
    largest: dict[int, int] = {}
    found = []
    for step in steps:
        largest[step.curve] = max(step.num_bytes, largest.get(step.curve, 0))
        found.append(largest[step.curve])
    return np.array(found, dtype=np.int64)


def _cumulative(values_K: NDArray[Number]) -> NDArray[Number]:
    return np.concatenate([np.zeros(1, dtype=values_K.dtype), values_K.cumsum()])
