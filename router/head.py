"""The linear classifier: its design matrix, its fit with scikit-learn, and folding it into tables.

Three blocks of columns, each row of length about 1 in each block:

    tokens     1 / sqrt(U) for each of the U distinct tokens
    pairs      1 / sqrt(P) for each of the P distinct pair buckets
    embedding  scale * (sum of the distinct tokens' embedding rows / sqrt(U) - mean over prompts)

The third is linear in the first, so both fold into one weight a token. The mean over prompts only
moves the bias; subtracting it makes the optimisation well-conditioned.

Shapes: N prompts, V vocabulary, B buckets, D domains, H embedding width, K width after projection,
T token columns and Q pair columns that occur.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.embedding import EmbeddingRows
from deltamux.router.features import NUM_BUCKETS, Ids, distinct
from deltamux.router.metrics import Labels
from deltamux.router.tables import Floats, Probabilities, Tables

#: Inverse strength of the L2 penalty. Chosen on seven domains of 500 prompts: between 1.5 and 15
#: held-out accuracy moved by less than 0.2 points.
INVERSE_PENALTY: Final = 5.0
#: Wider embeddings are projected to this many random directions, which nearly keeps all distances
#: (Johnson and Lindenstrauss 1984); it bounds the time of a fit.
MAX_EMBEDDING_WIDTH: Final = 768
#: A pair seen in a single prompt says nothing about other prompts.
MIN_PAIR_PROMPTS: Final = 2

_TOLERANCE: Final = 3e-4
_MAX_ITERATIONS: Final = 300


@dataclass(frozen=True)
class Design:
    """Training features, and what is needed to fold weights on them.

    Attributes:
        matrix: Sparse float32 [N, T + Q + K].
        tokens: Int64 [T], token id of each column.
        pairs: Int64 [Q], bucket of each column.
        projection: Float32 [H, K], scale included; None without an embedding.
        offset: Float32 [K], what was subtracted from the embedding block; None likewise.
    """

    matrix: Any
    tokens: Ids
    pairs: Ids
    projection: Floats | None
    offset: Floats | None


@dataclass(frozen=True)
class TrainingSet:
    """What is fitted on.

    Attributes:
        matrix: Sparse float32 [N, T + Q + K].
        truth: Int64 [N], the domains.
        weights: Float64 [N], how much each prompt counts within its domain.
    """

    matrix: Any
    truth: Labels
    weights: Probabilities

    def take(self, rows: Labels) -> "TrainingSet":
        """Return the given rows."""
        return TrainingSet(self.matrix[rows], self.truth[rows], self.weights[rows])


@dataclass(frozen=True)
class Head:
    """A fitted classifier: scores = matrix @ weights + bias; float64 [T + Q + K, D] and [D]."""

    weights: Probabilities
    bias: Probabilities

    def scores(self, matrix: Any) -> Probabilities:
        """Return the scores of the rows of a design matrix, float64 [N, D]."""
        return np.asarray(matrix @ self.weights + self.bias, dtype=np.float64)


def build_design(prompts: Sequence[Ids], embedding: EmbeddingRows | None, seed: int) -> Design:
    """Build the training features.

    Args:
        prompts: Bounded token ids of each prompt.
        embedding: The base's input embedding; None leaves its block out.
        seed: Of the random projection.
    """
    from scipy import sparse  # type: ignore[import-untyped]

    rows = [distinct(ids) for ids in prompts]
    tokens, token_block = _presence([row[0] for row in rows], min_prompts=1)
    pairs, pair_block = _presence([row[1] for row in rows], min_prompts=MIN_PAIR_PROMPTS)
    blocks = [token_block, pair_block]
    projection = offset = None
    if embedding is not None:
        projection = _projection(embedding.width, seed)
        summed = token_block @ (embedding.gather(tokens) @ projection)
        offset = summed.mean(axis=0)
        length = float(np.linalg.norm(summed - offset, axis=1).mean())
        scale = np.float32(1.0 / length if length > 0 else 1.0)
        projection, offset = projection * scale, offset * scale
        blocks.append(sparse.csr_array(summed * scale - offset))
    matrix = sparse.hstack(blocks, format="csr", dtype=np.float32)
    return Design(matrix, tokens, pairs, projection, offset)


def fit_head(training: TrainingSet, seed: int) -> Head:
    """Fit multinomial logistic regression, every domain weighing the same.

    Args:
        training: Holds every domain 0..D-1 at least once.
        seed: Handed to scikit-learn.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = LogisticRegression(
        C=INVERSE_PENALTY,
        class_weight="balanced",
        tol=_TOLERANCE,
        max_iter=_MAX_ITERATIONS,
        random_state=seed,
    )
    # The matrix is sparse: more BLAS threads would only wait for each other.
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # Held-out predictions judge the result; the last digits of the optimum do not matter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(training.matrix, training.truth, sample_weight=training.weights)
    coefficients = model.coef_.astype(np.float64)
    bias = model.intercept_.astype(np.float64)
    if len(coefficients) == 1:
        # For two domains scikit-learn keeps the difference of the two scores.
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        bias = np.concatenate([-bias, bias]) / 2
    return Head((coefficients - coefficients.mean(axis=0)).T, bias - bias.mean())


def fold(design: Design, head: Head, embedding: EmbeddingRows | None, vocab_size: int) -> Tables:
    """Fold a classifier into one table over tokens, one over pairs, and a bias.

    Args:
        design: What the classifier was fitted on.
        head: The classifier.
        embedding: As given to `build_design`.
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
    if embedding is not None and design.projection is not None and design.offset is not None:
        tokens[: embedding.num_rows] += embedding.project(design.projection @ embedding_weights)
        bias = bias - design.offset @ embedding_weights
    return Tables(tokens, pairs, bias)


def _presence(rows: Sequence[Ids], min_prompts: int) -> tuple[Ids, Any]:
    """Columns that occur in enough prompts, and the block with 1 / sqrt(row length) in them."""
    from scipy import sparse

    lengths = np.array([len(row) for row in rows])
    items = np.concatenate(rows)
    columns, inverse, counts = np.unique(items, return_inverse=True, return_counts=True)
    values = np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths).astype(np.float32)
    where = (np.repeat(np.arange(len(rows)), lengths), inverse)
    block = sparse.csr_array((values, where), shape=(len(rows), len(columns)))
    kept = np.flatnonzero(counts >= min_prompts)
    return columns[kept], block[:, kept]


def _projection(width: int, seed: int) -> Floats:
    """Float32 [H, K]: the identity, or random directions for a wide embedding."""
    if width <= MAX_EMBEDDING_WIDTH:
        return np.eye(width, dtype=np.float32)
    directions = np.random.default_rng(seed).standard_normal((width, MAX_EMBEDDING_WIDTH))
    scaled: Floats = (directions / np.sqrt(MAX_EMBEDDING_WIDTH)).astype(np.float32)
    return scaled
