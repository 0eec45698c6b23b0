"""The classifier of `tables.py`, fitted: first the meaning, then the wording on what it leaves over.

How strongly the wording is held back was chosen on held-out kinds of prompts of training files alone
(`benchmarks/routing/kinds.py`): forms and whole domains that a fit had not seen.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.tables import Floats, Probabilities, Tables
from deltamux.router.fit.design import Design
from deltamux.router.fit.head import Head, fit_head
from deltamux.router.fit.metrics import Labels

# Penalty of the meaning's weights, relative to the sum of the examples' weights: its strength does
# not fade with their number, because it stands against a shift and not against chance. Measured on
# held-out kinds of training prompts with the embedding alone: of 1e-4, 5e-4 and 2e-3 the first reaches
# as many experts (.63, .62) and keeps fewer strangers from them (.70 to .78 of unseen domains).
MEANING_PENALTY: Final = 5e-4
# Penalty of the wording's weights, relative to one prompt's weight. Measured likewise: 0.5 costs one
# part in a hundred of bare prompts and reaches no more experts.
WORDING_PENALTY: Final = 0.125


@dataclass(frozen=True)
class Settings:
    """How a classifier is fitted."""

    meaning_penalty: float = MEANING_PENALTY
    wording_penalty: float = WORDING_PENALTY


@dataclass(frozen=True)
class Examples:
    """Labels of a design's rows.

    Attributes:
        truth: Int64 [N].
        weights: Float64 [N], how much the wording of each counts within its domain.
        meaning: Float64 [N], how much the meaning of each counts.
        num_domains: D; of some there may be no example.
    """

    truth: Labels
    weights: Probabilities
    meaning: Probabilities
    num_domains: int


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier.

    Attributes:
        meaning: On the design's vectors.
        wording: On the known columns.
        columns: Int64 [C], the columns of tokens and pairs side by side that the wording reads.
        trust: Float32 [V, 2], by which the wording counts.
    """

    meaning: Head
    wording: Head
    columns: Labels
    trust: Floats

    def scores(self, design: Design, rows: Labels) -> Probabilities:
        """Return the scores of rows of a design, float64 [n, D]."""
        wording = _side_by_side(design)[rows][:, self.columns] @ self.wording.weights
        found: Probabilities = np.asarray(wording, dtype=np.float64)
        found *= design.strengths(rows, self.trust)
        return found + self.meaning.scores(design.meaning[rows])

    def fold(self, design: Design, vocab_size: int, buckets: int) -> Tables:
        """Return the tables whose scores equal the classifier's up to rounding."""
        num_domains = self.wording.weights.shape[1]
        both = np.zeros((vocab_size + buckets, num_domains), dtype=np.float32)
        both[self.columns] = self.wording.weights
        width = len(self.meaning.weights) - len(design.offset)
        told, embedded = np.split(self.meaning.weights.astype(np.float32), [width])
        tokens = np.zeros((vocab_size, num_domains), dtype=np.float32)
        if design.vectors is not None:
            tokens[: design.vectors.embedding.num_rows] = design.vectors.project(embedded)
        return Tables(
            tokens=tokens,
            pairs=both[vocab_size:],
            bias=(self.meaning.bias - design.offset @ embedded).astype(np.float32),
            meaning=told if width else None,
            words=both[:vocab_size] * design.weights,
            trust=self.trust,
        )


def fit_classifier(
    design: Design, examples: Examples, rows: Labels, settings: Settings | None = None
) -> Classifier:
    """Fit on some rows of a design.

    Args:
        design: Features of all examples.
        examples: Their labels.
        rows: Int64 [n], which to fit on.
        settings: None for the defaults.
    """
    settings = settings or Settings()
    truth, num_domains = examples.truth[rows], examples.num_domains
    heard = rows[examples.meaning[rows] > 0]
    weights = examples.meaning[heard]
    meaning = fit_head(
        design.meaning[heard],
        examples.truth[heard],
        weights,
        num_domains,
        penalty=settings.meaning_penalty * float(weights.sum()),
    )
    side = _side_by_side(design)[rows]
    used = np.zeros(side.shape[1], dtype=np.bool_)
    used[side.indices] = True
    used[design.tokens.shape[1] :] &= design.known(rows)
    columns = np.flatnonzero(used)
    wording = fit_head(
        side[:, columns],
        truth,
        examples.weights[rows],
        num_domains,
        penalty=settings.wording_penalty,
        offset=meaning.scores(design.meaning[rows]),
    )
    return Classifier(meaning, wording, columns, design.trust(rows))


def _side_by_side(design: Design) -> Any:
    """Tokens and pairs, CSR float32 [N, V + B]."""
    from scipy import sparse

    return sparse.hstack([design.tokens, design.pairs], format="csr")
