"""How many bytes each matrix gets: one rung of a rate-distortion ladder per matrix, within a budget.

A compressor measures for every linear matrix c a ladder of ways to compress its delta, each with its
real bytes b and the share e of the delta's output energy that it loses. Every method here solves

    min Σ_c w_c e_c(r_c)   subject to   Σ_c b_c(r_c) ≤ B

or searches for the rungs r under a measured objective instead of the sum. That the sum stands for the
whole model is the linearity theorem of HIGGS (Malinovskii et al., NAACL 2025,
https://aclanthology.org/2025.naacl-long.543): the loss grows linearly in the layers' relative errors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

Choice = list[int]  # a rung index for every curve
Objective = Callable[[Choice], float]


@dataclass(frozen=True)
class Rung:
    """One way to compress a matrix.

    Attributes:
        num_bytes: Size on disk.
        error: Share of the delta's output energy that is lost; 1 = no delta at all.
    """

    num_bytes: int
    error: float


@dataclass(frozen=True)
class Curve:
    """The rungs of one matrix.

    Attributes:
        name: Of the matrix.
        layer: Decoder layer index.
        num_weights: Of the matrix, all of them.
        importance: What an error of 1 in this matrix costs.
        rungs: Ascending in bytes; the first is no delta at all (0 bytes, error 1), only it is free.
        num_tensors: That a rung is stored in, at most.
    """

    name: str
    layer: int
    num_weights: int
    importance: float
    rungs: tuple[Rung, ...]
    num_tensors: int = 4

    def __post_init__(self) -> None:
        sizes = [rung.num_bytes for rung in self.rungs]
        if sizes[:1] != [0] or sizes != sorted(sizes) or sizes.count(0) > 1:
            raise ValueError(
                f"the rungs of {self.name!r} must ascend in bytes from a single one of 0 bytes, "
                f"got {sizes}: put 'no delta' first and sort the others"
            )
        costs = [self.importance, *(rung.error for rung in self.rungs)]
        if not all(math.isfinite(cost) and cost >= 0 for cost in costs) or self.num_weights < 1:
            raise ValueError(
                f"{self.name!r} must have a weight and finite importance and errors from 0 up, got "
                f"{self.num_weights} weights, importance and errors {costs}: measure it again"
            )


Allocator = Callable[[Sequence[Curve], int, Objective], Choice]


def allocate(
    method: str | Allocator,
    curves: Sequence[Curve],
    budget_bytes: int,
    objective: Objective | None = None,
) -> Choice:
    """Choose a rung for every curve so that all together stay within the budget.

    A rung that costs no less than another and errs no less is never chosen.

    Args:
        method: A key of ALLOCATORS, or an allocator with parameters of its own, for instance
            `partial(evolve, generations=30)`. It sees curves without dominated rungs.
        curves: One per matrix.
        budget_bytes: Upper bound of the total.
        objective: What the searching methods minimise, measured at most once for every choice; NaN
            counts as infinite. None: `predicted_loss`.

    Returns:
        A rung index for every curve. The same arguments give the same choice, as long as objective
        and method do.

    Raises:
        ValueError: The method is unknown or the budget negative.
    """
    if isinstance(method, str):
        if method not in ALLOCATORS:
            raise ValueError(f"'method' must be one of {sorted(ALLOCATORS)}, got {method!r}")
        method = ALLOCATORS[method]
    if budget_bytes < 0:
        raise ValueError(
            f"'budget_bytes' must be 0 or more, got {budget_bytes}: 0 drops all deltas"
        )
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


def total_bytes(curves: Sequence[Curve], choice: Sequence[int]) -> int:
    """Bytes of the chosen rungs."""
    return sum(c.rungs[rung].num_bytes for c, rung in zip(curves, choice, strict=True))


def predicted_loss(curves: Sequence[Curve], choice: Sequence[int]) -> float:
    """Σ importance · error of the chosen rungs."""
    return sum(c.importance * c.rungs[rung].error for c, rung in zip(curves, choice, strict=True))


def pareto_front(curve: Curve) -> list[int]:
    """Indices of the rungs that no other rung dominates, strictly ascending in bytes."""
    front: list[int] = []
    rungs = curve.rungs
    for index in sorted(range(len(rungs)), key=lambda i: (rungs[i].num_bytes, rungs[i].error)):
        if not front or rungs[index].error < rungs[front[-1]].error:
            front.append(index)
    return front


def keep_rungs(curve: Curve, indices: Sequence[int]) -> Curve:
    """The curve with these rungs alone; `indices` maps its rungs back."""
    return replace(curve, rungs=tuple(curve.rungs[index] for index in indices))


def _uniform(curves: Sequence[Curve], budget_bytes: int, _objective: Objective) -> Choice:
    from deltamux.compression.choice.uniform import uniform

    return uniform(curves, budget_bytes)


def _knapsack(curves: Sequence[Curve], budget_bytes: int, _objective: Objective) -> Choice:
    from deltamux.compression.choice.knapsack import knapsack

    return knapsack(curves, budget_bytes)


def _atp(curves: Sequence[Curve], budget_bytes: int, objective: Objective) -> Choice:
    from deltamux.compression.choice.depth import atp

    return atp(curves, budget_bytes, objective)


def _knapsack_atp(curves: Sequence[Curve], budget_bytes: int, objective: Objective) -> Choice:
    from deltamux.compression.choice.depth import knapsack_atp

    return knapsack_atp(curves, budget_bytes, objective)


def _evolution(curves: Sequence[Curve], budget_bytes: int, objective: Objective) -> Choice:
    from deltamux.compression.choice.evolution import evolve

    return evolve(curves, budget_bytes, objective)


def _fcpts(curves: Sequence[Curve], budget_bytes: int, _objective: Objective) -> Choice:
    from deltamux.compression.choice.threshold import fcpts

    return fcpts(curves, budget_bytes)


# The methods build on this file: each is imported when it is first used.
ALLOCATORS: dict[str, Allocator] = {
    "uniform": _uniform,
    "knapsack": _knapsack,
    "atp": _atp,
    "knapsack-atp": _knapsack_atp,
    "evolution": _evolution,
    "fcpts": _fcpts,
}
