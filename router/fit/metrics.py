"""How good predictions are: accuracy, macro F1, expected calibration error.

Shapes: N predictions, D domains.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from deltamux.router.decide.tables import Probabilities

Labels = npt.NDArray[np.int64]

NUM_BINS: Final = 15


@dataclass(frozen=True)
class Quality:
    """Accuracy, macro F1 and expected calibration error, each in [0, 1], over `n` predictions."""

    accuracy: float
    macro_f1: float
    ece: float
    n: int


def quality(predicted: Labels, confidence: Probabilities, truth: Labels) -> Quality:
    """Judge predictions.

    Args:
        predicted: Int64 [N], index of the predicted domain.
        confidence: Float64 [N], probability given to the prediction.
        truth: Int64 [N].

    Raises:
        ValueError: There are no predictions.
    """
    if not truth.size:
        raise ValueError("nothing to judge: no prompt of a domain that the router knows")
    right = predicted == truth
    return Quality(
        accuracy=float(right.mean()),
        macro_f1=macro_f1(predicted, truth),
        ece=calibration_error(confidence, right),
        n=truth.size,
    )


def macro_f1(predicted: Labels, truth: Labels) -> float:
    """Mean over the domains in `truth` of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for domain in np.unique(truth):
        hits = np.sum((predicted == domain) & (truth == domain))
        scores.append(2 * hits / (np.sum(predicted == domain) + np.sum(truth == domain)))
    return float(np.mean(scores))


def calibration_error(confidence: Probabilities, right: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error over 15 bins of equal width.

    The mean over the bins of |accuracy - mean confidence|, weighted by the bins' sizes (Guo et al.
    2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3).
    """
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
