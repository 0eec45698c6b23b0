"""The same bits per weight everywhere, and its generalisation to given relative rates.

The comparison point of every allocation method: ATP (arXiv 2502.14770), FCPTS (arXiv 2405.05808) and
Self-Pruner (arXiv 2502.14413) all measure themselves against a uniform rate.
"""

from bisect import bisect_right
from collections.abc import Sequence

from deltamux.compression.choice.problem import Choice, Curve


def uniform(curves: Sequence[Curve], budget_bytes: int) -> Choice:
    """The same bits per weight everywhere: the largest common rate that fits, and no more.

    What that leaves of the budget stays unused: this is what the other methods compare with.
    """
    ladders = [[rung.num_bytes for rung in curve.rungs] for curve in curves]
    return largest_fit(ladders, [curve.num_weights for curve in curves], budget_bytes)


def largest_fit(
    ladders: Sequence[Sequence[int]], shares: Sequence[float], budget_bytes: int
) -> Choice:
    """For the largest common factor f that fits: the largest rung of at most f · share bytes each.

    Args:
        ladders: Bytes of every item's rungs, ascending from 0.
        shares: Relative bytes that each item is to have, 0 or more.
        budget_bytes: Upper bound of the total.
    """
    # The choice changes only at the factors where a rung comes within reach.
    reached = [
        [0.0, *(size / share for size in ladder[1:] if share > 0)]
        for ladder, share in zip(ladders, shares, strict=True)
    ]

    def choice_at(factor: float) -> Choice:
        return [bisect_right(factors, factor) - 1 for factors in reached]

    def bytes_at(factor: float) -> int:
        return sum(ladder[i] for ladder, i in zip(ladders, choice_at(factor), strict=True))

    factors = sorted({0.0}.union(*reached))
    return choice_at(factors[bisect_right(factors, budget_bytes, key=bytes_at) - 1])
