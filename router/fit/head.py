"""Softmax regression with an L2 penalty, on top of scores that are given.

    minimise  sum over prompts of weight * -log softmax(offset + columns W + bias)[truth]
              + penalty / 2 * |W|^2

by L-BFGS (Liu and Nocedal 1989). The offset is what another classifier already says; without one
this is plain multinomial logistic regression.

Shapes: N prompts, C columns, D domains.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.tables import Probabilities
from deltamux.router.fit.metrics import Labels

_MAX_ITERATIONS: Final = 200
# Largest entry of the gradient, relative to the weights' sum, at which the fit has ended.
_TOLERANCE: Final = 1e-5
_OPTIONS: Final = {"maxiter": _MAX_ITERATIONS, "gtol": _TOLERANCE, "ftol": 1e-9}
# Bias of a domain without prompts.
_UNSEEN: Final = -20.0


@dataclass(frozen=True)
class Head:
    """A fitted classifier: float64 weights [C, D] and bias [D]."""

    weights: Probabilities
    bias: Probabilities

    def scores(self, columns: Any) -> Probabilities:
        """Return the scores of rows, float64 [N, D]."""
        return np.asarray(columns @ self.weights + self.bias, dtype=np.float64)


def _biases(truth: Labels, num_domains: int, learned: bool) -> tuple[Probabilities, Any]:
    """Where biases start, float64 [D], and which of them prompts move, bool [D]: where a domain has none, it stays."""
    seen = np.bincount(truth, minlength=num_domains) > 0
    return np.where(seen | (not learned), 0.0, _UNSEEN), seen & learned


def fit_head(
    columns: Any,
    truth: Labels,
    weights: Probabilities,
    num_domains: int,
    *,
    penalty: float,
    offset: Probabilities | None = None,
) -> Head:
    """Fit, every domain weighing the same.

    Args:
        columns: Float32 [N, C], dense or CSR.
        truth: Int64 [N].
        weights: Float64 [N], how much each prompt counts within its domain.
        num_domains: D; one without prompts gets the lowest score.
        penalty: Strength of the L2 penalty, relative to a prompt's weight.
        offset: Float64 [N, D]; with it there is no bias.
    """
    from scipy.optimize import minimize

    balanced = balance(truth, weights)
    total = balanced.sum()
    num_columns = columns.shape[1]
    targets = np.eye(num_domains)[truth]
    start, free = _biases(truth, num_domains, offset is None)
    given = np.zeros((len(truth), num_domains)) if offset is None else offset

    def loss(flat: Probabilities) -> tuple[float, Probabilities]:
        matrix, bias = flat[:-num_domains].reshape(num_columns, num_domains), flat[-num_domains:]
        scores = given + columns @ matrix.astype(np.float32) + bias
        misfit, errors = _misfit(scores, targets, balanced)
        slope = columns.T @ errors.astype(np.float32) + penalty * matrix
        value = misfit + penalty / 2 * float((matrix**2).sum())
        gradient = np.concatenate([slope.ravel(), errors.sum(axis=0) * free])
        return value / total, gradient / total

    first = np.pad(start, (num_columns * num_domains, 0))
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=_OPTIONS).x
    return Head(found[:-num_domains].reshape(num_columns, num_domains), found[-num_domains:])


def _misfit(
    scores: Probabilities, targets: Probabilities, weights: Probabilities
) -> tuple[float, Probabilities]:
    """The weighted negative log-likelihood of scores, and its derivative by them, [N, D]."""
    scores = scores - scores.max(axis=1, keepdims=True)
    powers = np.exp(scores)
    sums = powers.sum(axis=1, keepdims=True)
    misfit = float(weights @ (np.log(sums[:, 0]) - (scores * targets).sum(axis=1)))
    return misfit, (powers / sums - targets) * weights[:, None]


def balance(truth: Labels, weights: Probabilities) -> Probabilities:
    """Scale weights so that every domain has the same share of an unchanged sum, float64 [N]."""
    totals = np.bincount(truth, weights=weights)
    present = np.count_nonzero(totals)
    scaled: Probabilities = weights * weights.sum() / (present * totals[truth])
    return scaled
