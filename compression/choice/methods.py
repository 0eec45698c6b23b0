"""The methods by name, and how one that knows a single budget keeps two.

Every byte in a slot is given a price λ. With

    w e' = w e + λ s

in the place of every rung's error, the methods minimise Σ w e + λ Σ s within the budget on disk, and the least price
at which the slot's budget is kept is found by bisection: a Lagrange multiplier for one of the two constraints
(Everett 1963, "Generalized Lagrange multiplier method", Operations Research 11(3)). What single rungs leave of
both budgets is filled by steps that fit both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from deltamux.compression.choice.depth import atp, knapsack_atp
from deltamux.compression.choice.evolution import evolve
from deltamux.compression.choice.knapsack import fill, knapsack
from deltamux.compression.choice.problem import (
    Choice,
    Curve,
    Objective,
    keep_rungs,
    pareto_front,
    predicted_loss,
    total_bytes,
    total_slot_bytes,
)
from deltamux.compression.choice.threshold import fcpts
from deltamux.compression.choice.uniform import uniform

Allocator = Callable[[Sequence[Curve], int, Objective], Choice]

ALLOCATORS: dict[str, Allocator] = {
    "uniform": lambda curves, budget_bytes, _objective: uniform(curves, budget_bytes),
    "knapsack": lambda curves, budget_bytes, _objective: knapsack(curves, budget_bytes),
    "atp": atp,
    "knapsack-atp": knapsack_atp,
    "evolution": evolve,
    "fcpts": lambda curves, budget_bytes, _objective: fcpts(curves, budget_bytes),
}
# Bisection of the price, over as many powers of two below the one that forbids everything.
PRICE_STEPS = 40
PRICE_OCTAVES = 60
# A method other than the knapsack may need a higher price: by how much it is raised, and how often.
PRICE_FACTOR = 1.2
PRICE_RAISES = 20


def allocate(
    method: str | Allocator,
    curves: Sequence[Curve],
    budget_bytes: int,
    objective: Objective | None = None,
    slot_bytes: int | None = None,
) -> Choice:
    """Choose a rung for every curve so that all together stay within the budgets.

    A rung that costs no less than another and errs no less is never chosen, unless it takes less in a slot.

    Args:
        method: A key of ALLOCATORS, or an allocator with parameters of its own, for instance
            `partial(evolve, generations=30)`. It sees curves without dominated rungs.
        curves: One per matrix.
        budget_bytes: Upper bound of the total on disk.
        objective: What the searching methods minimise, measured at most once for every choice; NaN
            counts as infinite. None: the predicted loss.
        slot_bytes: Upper bound of the total in a slot; None: there is none.

    Returns:
        A rung index for every curve. The same arguments give the same choice, as long as objective
        and method do.

    Raises:
        ValueError: The method is unknown or a budget negative.
    """
    if isinstance(method, str):
        if method not in ALLOCATORS:
            raise ValueError(f"'method' must be one of {sorted(ALLOCATORS)}, got {method!r}")
        method = ALLOCATORS[method]
    for name, budget in (("budget_bytes", budget_bytes), ("slot_bytes", slot_bytes)):
        if budget is not None and budget < 0:
            raise ValueError(f"{name!r} must be 0 or more, got {budget}: 0 drops all deltas")
    choice = _within_disk(method, curves, budget_bytes, objective)
    if slot_bytes is None or total_slot_bytes(curves, choice) <= slot_bytes:
        return choice
    return _within_both(method, curves, (budget_bytes, slot_bytes), objective)


def priced(curves: Sequence[Curve], price: float) -> list[Curve]:
    """The curves with a price on every byte in a slot.

    Args:
        curves: One per matrix.
        price: λ, in units of importance times error.
    """
    # What no error costs anything would take slot bytes at any price.
    least = max((curve.importance for curve in curves), default=0.0) * 1e-12
    found = []
    for curve in curves:
        importance = max(curve.importance, least)
        per_byte = price / importance if importance > 0 else 0.0
        rungs = tuple(
            replace(rung, error=rung.error + per_byte * rung.slot_bytes) for rung in curve.rungs
        )
        found.append(replace(curve, importance=importance, rungs=rungs))
    return found


def _within_both(
    method: Allocator,
    curves: Sequence[Curve],
    budgets: tuple[int, int],
    objective: Objective | None,
) -> Choice:
    budget_bytes, slot_bytes = budgets

    def knapsack_at(price: float) -> Choice:
        return _within_disk(ALLOCATORS["knapsack"], priced(curves, price), budget_bytes, None)

    def fits(choice: Choice) -> bool:
        return total_slot_bytes(curves, choice) <= slot_bytes

    price = _least_price(curves, lambda at: fits(knapsack_at(at)))
    choice = knapsack_at(price)
    if method is not ALLOCATORS["knapsack"]:
        limited = None if objective is None else _limited(objective, fits)
        for _ in range(PRICE_RAISES):
            proposed = _within_disk(method, priced(curves, price), budget_bytes, limited)
            if fits(proposed):
                choice = proposed
                break
            price *= PRICE_FACTOR
    return _filled(curves, choice, budgets)


def _least_price(curves: Sequence[Curve], fits: Callable[[float], bool]) -> float:
    """The least price at which a choice fits, by bisection of its logarithm."""
    # At this price the least slot costs more than all of the delta is worth.
    worth = [
        2 * curve.importance / rung.slot_bytes
        for curve in curves
        for rung in curve.rungs
        if rung.slot_bytes
    ]
    high = math.log2(max(worth, default=1.0) or 1.0)
    low = high - PRICE_OCTAVES
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(2.0**middle) else (middle, high)
    return float(2.0**high)


def _limited(objective: Objective, fits: Callable[[Choice], bool]) -> Objective:
    """An objective that is infinite for what does not fit, and is not measured there."""
    return lambda choice: objective(choice) if fits(choice) else math.inf


def _filled(curves: Sequence[Curve], choice: Choice, budgets: tuple[int, int]) -> Choice:
    """Spend what is left of both budgets on rungs that are not dominated on disk."""
    kept = [
        sorted({*pareto_front(curve), rung}) for curve, rung in zip(curves, choice, strict=True)
    ]
    pruned = [keep_rungs(curve, front) for curve, front in zip(curves, kept, strict=True)]
    start = [front.index(rung) for front, rung in zip(kept, choice, strict=True)]
    found = fill(pruned, start, *budgets)
    return [front[rung] for front, rung in zip(kept, found, strict=True)]


def _within_disk(
    method: Allocator, curves: Sequence[Curve], budget_bytes: int, objective: Objective | None
) -> Choice:
    fronts = [pareto_front(curve) for curve in curves]
    pruned = [keep_rungs(curve, front) for curve, front in zip(curves, fronts, strict=True)]

    def original(choice: Sequence[int]) -> Choice:
        return [front[rung] for front, rung in zip(fronts, choice, strict=True)]

    @cache
    def measured(choice: tuple[int, ...]) -> float:
        loss = predicted_loss(curves, choice) if objective is None else objective(list(choice))
        return math.inf if math.isnan(loss) else loss

    best = [len(curve.rungs) - 1 for curve in pruned]
    if total_bytes(pruned, best) > budget_bytes:
        best = method(pruned, budget_bytes, lambda choice: measured(tuple(original(choice))))
    return original(best)
