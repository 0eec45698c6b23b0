"""The linear classifier: its fit, and folding it into tables.

scikit-learn's multinomial logistic regression on the columns of `design.py`. Their embedding block
is linear in their token block, so both fold into one weight a token.

Shapes: N prompts, V vocabulary, D domains; K width of a token's vector, T token columns, Q pair
columns.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.features import NUM_BUCKETS
from deltamux.router.decide.tables import Probabilities, Tables
from deltamux.router.fit.design import Design
from deltamux.router.fit.metrics import Labels

#: Inverse strength of the L2 penalty, relative to a prompt's weight: scikit-learn's `C`.
INVERSE_PENALTY: Final = 5.0
_MAX_ITERATIONS: Final = 1000
#: Score of a domain without prompts.
_UNSEEN: Final = -20.0


@dataclass(frozen=True)
class TrainingSet:
    """What is fitted on.

    Attributes:
        columns: CSR float32 [N, T + Q + K].
        truth: Int64 [N], the domains.
        weights: Float64 [N], how much each prompt counts within its domain.
        num_domains: D; of some there may be no prompt.
    """

    columns: Any
    truth: Labels
    weights: Probabilities
    num_domains: int

    def take(self, rows: Labels) -> "TrainingSet":
        """Return the given rows."""
        return TrainingSet(
            self.columns[rows], self.truth[rows], self.weights[rows], self.num_domains
        )


@dataclass(frozen=True)
class Head:
    """A fitted classifier: float64 weights [T + Q + K, D] and bias [D]."""

    weights: Probabilities
    bias: Probabilities

    def scores(self, columns: Any) -> Probabilities:
        """Return the scores of rows of a design, float64 [N, D]."""
        return np.asarray(columns @ self.weights + self.bias, dtype=np.float64)


def fit_head(training: TrainingSet, inverse_penalty: float = INVERSE_PENALTY) -> Head:
    """Fit scikit-learn's logistic regression, every domain weighing the same.

    Args:
        training: A domain of which it has no prompt gets the lowest score.
        inverse_penalty: scikit-learn's `C`.

    Returns:
        A classifier of D domains. Of two, scikit-learn fits the difference of the scores; each gets
        half of it.
    """
    from sklearn.linear_model import LogisticRegression

    weights = np.zeros((training.columns.shape[1], training.num_domains))
    bias = np.full(training.num_domains, _UNSEEN)
    seen = np.unique(training.truth)
    bias[seen] = 0.0
    if len(seen) > 1:
        model = LogisticRegression(C=inverse_penalty, max_iter=_MAX_ITERATIONS)
        balanced = balance(training.truth, training.weights)
        model.fit(training.columns, training.truth, sample_weight=balanced)
        signs = np.array([[-0.5], [0.5]]) if len(seen) == 2 else 1.0
        weights[:, seen] = (model.coef_ * signs).T
        bias[seen] = (model.intercept_[:, None] * signs).ravel()
    return Head(weights, bias)


def balance(truth: Labels, weights: Probabilities) -> Probabilities:
    """Scale weights so that every domain has the same share of an unchanged sum, float64 [N]."""
    totals = np.bincount(truth, weights=weights)
    scaled: Probabilities = weights * weights.sum() / (len(totals) * totals[truth])
    return scaled


def fold(design: Design, head: Head, vocab_size: int) -> Tables:
    """Fold a classifier into tables.

    Args:
        design: What the classifier was fitted on.
        head: The classifier.
        vocab_size: V; at least the embedding's rows and every token id.

    Returns:
        Tables whose scores equal the classifier's up to float32 rounding.
    """
    num_tokens, num_pairs = len(design.tokens), len(design.pairs)
    weights = head.weights.astype(np.float32)
    token_weights, pair_weights, embedding_weights = np.split(
        weights, [num_tokens, num_tokens + num_pairs]
    )
    num_domains = weights.shape[1]
    tokens = np.zeros((vocab_size, num_domains), dtype=np.float32)
    pairs = np.zeros((NUM_BUCKETS, num_domains), dtype=np.float32)
    bias = head.bias.astype(np.float32)
    tokens[design.tokens] = token_weights
    pairs[design.pairs] = pair_weights
    if design.vectors is not None:
        tokens[: design.vectors.embedding.num_rows] += design.vectors.project(embedding_weights)
        bias = bias - design.offset @ embedding_weights
    return Tables(tokens, pairs, bias)
