"""Curves over labelled prompts: confusion, reliability, risk against coverage.

Shapes: N prompts, D domains.
"""

from dataclasses import dataclass

import numpy as np

from deltamux.router.decide.tables import Mask, Probabilities
from deltamux.router.fit.metrics import NUM_BINS, Labels


@dataclass(frozen=True)
class Curves:
    """What `router evaluate` draws.

    Attributes:
        labels: The router's domains, then "other" for prompts of unknown domains, if any.
        answers: Who may answer: the domains with an expert, then "base".
        confusion: Prompts of each label (rows) by who answers (columns).
        reliability: For each of 15 bins of confidence: mean confidence, accuracy, prompts; None for
            an empty bin.
        risk_coverage: At each threshold: the threshold, the share of prompts that get an expert, and
            the share of these that get a wrong one.
        threshold: The router's own, where all domains share it.
    """

    labels: list[str]
    answers: list[str]
    confusion: list[list[int]]
    reliability: list[tuple[float, float, int] | None]
    risk_coverage: list[tuple[float, float, float]]
    threshold: float


def reliability(confidence: Probabilities, right: Mask) -> list[tuple[float, float, int] | None]:
    """Return mean confidence, accuracy and count of each of 15 bins of equal width.

    Args:
        confidence: Float64 [N], probability of the most probable domain.
        right: Bool [N].
    """
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    found: list[tuple[float, float, int] | None] = []
    for number in range(NUM_BINS):
        inside = bins == number
        count = int(inside.sum())
        mean = (float(confidence[inside].mean()), float(right[inside].mean())) if count else None
        found.append((*mean, count) if mean else None)
    return found


def risk_coverage(
    probabilities: Probabilities, truth: Labels, specialists: Mask
) -> list[tuple[float, float, float]]:
    """Return threshold, coverage and risk, thresholds ascending (El-Yaniv and Wiener 2010).

    Coverage is the share of prompts that an expert answers at this threshold; risk is the share of
    these whose expert is not their own. Thresholds at which nothing is answered are left out.

    Args:
        probabilities: Float64 [N, D].
        truth: Int64 [N]; -1 for a domain that the router does not know.
        specialists: Bool [D].
    """
    best = probabilities.argmax(axis=1)
    scores = np.where(specialists[best], probabilities.max(axis=1), -1.0)
    points = []
    # Most of what matters lies close to 1.
    for threshold in np.unique(
        np.concatenate([np.linspace(0, 0.9, 19), 1 - np.logspace(-1, -4, 31)])
    ):
        routed = scores >= threshold
        if routed.any():
            wrong = float((best != truth)[routed].mean())
            points.append((round(float(threshold), 6), float(routed.mean()), wrong))
    return points
