"""Honest probabilities and a threshold, both from held-out predictions.

Shapes: N held-out prompts, D domains.
"""

import math
from typing import Final

import numpy as np

from deltamux.router.decide.tables import Mask, Probabilities, softmax
from deltamux.router.fit.metrics import Labels

# Bounds of 1 / temperature, and halvings of that range on a logarithmic scale.
_SHARPNESS: Final = (1e-2, 1e2)
_HALVINGS: Final = 60

# Threshold where nothing asks for more: more probable than all else together. Chosen, not measured;
# docs/router.md has what other thresholds give.
LEAST: Final = 0.5
# Part of the prompts of no expert, of fields that a fit had not seen, that may reach one. Chosen, not measured.
MAX_STRAY: Final = 0.03


def fit_temperature(scores: Probabilities, truth: Labels) -> float:
    """Fit one-parameter temperature scaling.

    Minimises the negative log-likelihood of softmax(scores / T) (Guo et al. 2017, arXiv:1706.04599,
    section 4.2). It is convex in 1 / T, so its derivative is bisected. The targets are smoothed as
    Platt (1999, "Probabilistic Outputs for Support Vector Machines", section 2.2) does, with
    (n + 1) / (n + 2) for the true domain, of which there are n prompts, and the rest shared by the
    others: without that, perfectly separated prompts would ask for a temperature of zero.

    Args:
        scores: Float64 [N, D], of prompts that were not fitted on.
        truth: Int64 [N].

    Returns:
        A temperature in [0.01, 100].
    """
    missing = 1 / (np.bincount(truth)[truth] + 2)
    targets = np.repeat(missing[:, None] / (scores.shape[1] - 1), scores.shape[1], axis=1)
    targets[np.arange(len(truth)), truth] = 1 - missing
    wanted = np.sum(targets * scores)
    low, high = np.log(_SHARPNESS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = np.sum(softmax(scores * np.exp(middle)) * scores) - wanted
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def specialist_scores(probabilities: Probabilities, specialists: Mask) -> Probabilities:
    """Return what the threshold is compared with, float64 [N].

    The largest probability over the specialists; 0 where another domain is more probable, since
    such a prompt is not routed at any threshold.

    Args:
        probabilities: Float64 [N, D].
        specialists: Bool [D].
    """
    best = probabilities.max(axis=1)
    return np.where(specialists[probabilities.argmax(axis=1)], best, 0.0)


def fit_threshold(
    probabilities: Probabilities,
    truth: Labels,
    specialists: Mask,
    strangers: Mask,
    labelled: int,
    *,
    keep: float,
    max_wrong: float,
) -> float:
    """Return the smallest threshold at which few prompts reach an expert that is not their own.

    An expert must be more probable than all else together, where that keeps enough of the
    specialists' own prompts. As far as it keeps them, the threshold lets `MAX_STRAY` of the prompts
    of no expert pass; and `max_wrong` of all, whatever it keeps.

    Args:
        probabilities: Float64 [N, D], calibrated, of prompts that were not fitted on.
        truth: Int64 [N].
        specialists: Bool [D].
        strangers: Bool [N], generated prompts, which belong to no expert.
        labelled: The first so many prompts are the user's.
        keep: Share of the specialists' own prompts to keep, in (0, 1].
        max_wrong: Largest share of the N prompts, in (0, 1].

    Returns:
        A threshold in [0, 1].
    """
    least = LEAST
    if strangers.any():
        stray = threshold_for(probabilities[strangers], truth[strangers], specialists, MAX_STRAY)
        least = max(least, stray)
    own = kept_threshold(probabilities[:labelled], truth[:labelled], specialists, keep)
    return max(min(least, own), threshold_for(probabilities, truth, specialists, max_wrong))


def kept_threshold(
    probabilities: Probabilities, truth: Labels, specialists: Mask, keep: float
) -> float:
    """Return the largest threshold that keeps a share of the specialists' own prompts, in [0, 1]."""
    own = np.sort(specialist_scores(probabilities, specialists)[specialists[truth]])
    # Rounding must not turn a whole number of prompts into one more.
    num_kept = max(1, math.ceil(keep * len(own) - 1e-9))
    return float(own[len(own) - num_kept])


def wrong_expert(
    probabilities: Probabilities, truth: Labels, specialists: Mask, threshold: float
) -> Mask:
    """Return which prompts an expert answers that is not their own, bool [N].

    Args:
        probabilities: Float64 [N, D], calibrated.
        truth: Int64 [N].
        specialists: Bool [D].
        threshold: Smallest probability with which a specialist is routed.
    """
    routed = specialist_scores(probabilities, specialists) >= max(threshold, 1e-12)
    return np.asarray(routed & (probabilities.argmax(axis=1) != truth))


def threshold_for(
    probabilities: Probabilities, truth: Labels, specialists: Mask, max_wrong: float
) -> float:
    """Return the smallest threshold at which few enough prompts get a wrong expert.

    Args:
        probabilities: Float64 [N, D], calibrated, of prompts that were not fitted on.
        truth: Int64 [N].
        specialists: Bool [D].
        max_wrong: Largest share of the N prompts, in (0, 1].

    Returns:
        A threshold in [0, 1]; just above the allowed prompt with the highest probability.
    """
    missed = wrong_expert(probabilities, truth, specialists, 0.0)
    scores = np.sort(specialist_scores(probabilities, specialists)[missed])[::-1]
    allowed = math.floor(max_wrong * len(truth) + 1e-9)
    if len(scores) <= allowed:
        return 0.0
    return min(1.0, float(np.nextafter(scores[allowed], 2.0)))
