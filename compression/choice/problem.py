"""How many bytes each matrix gets: one rung of a rate-distortion ladder per matrix, within a budget.

A compressor measures for every linear matrix c a ladder of ways to compress its delta, each with its
real bytes b on disk and s in a slot, and the share e of the delta's output energy that it loses. What is wanted is

    min Σ_c w_c e_c(r_c)   subject to   Σ_c b_c(r_c) ≤ B   and   Σ_c s_c(r_c) ≤ S .

The methods know the first budget alone and solve this, or search for the rungs r under a measured objective
instead of the sum; `methods.py` brings in the second. That the sum stands for the
whole model is the linearity theorem of HIGGS (Malinovskii et al., NAACL 2025,
https://aclanthology.org/2025.naacl-long.543): the loss grows linearly in the layers' relative errors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Choice = list[int]  # a rung index for every curve
Objective = Callable[[Choice], float]


@dataclass(frozen=True)
class Rung:
    """One way to compress a matrix.

    Attributes:
        num_bytes: Size on disk.
        error: Share of the delta's output energy that is lost; 1 = no delta at all.
        slot_bytes: Size in a slot.
    """

    num_bytes: int
    error: float
    slot_bytes: int = 0


@dataclass(frozen=True)
class Curve:
    """The rungs of one matrix.

    Attributes:
        name: Of the matrix.
        layer: Decoder layer index.
        num_weights: Of the matrix, all of them.
        importance: What an error of 1 in this matrix costs.
        rungs: Ascending in bytes; the first is no delta at all (0 bytes, error 1), only it is free.
    """

    name: str
    layer: int
    num_weights: int
    importance: float
    rungs: tuple[Rung, ...]

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


def total_bytes(curves: Sequence[Curve], choice: Sequence[int]) -> int:
    """Bytes of the chosen rungs."""
    return sum(c.rungs[rung].num_bytes for c, rung in zip(curves, choice, strict=True))


def total_slot_bytes(curves: Sequence[Curve], choice: Sequence[int]) -> int:
    """Bytes of the chosen rungs in a slot."""
    return sum(c.rungs[rung].slot_bytes for c, rung in zip(curves, choice, strict=True))


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
