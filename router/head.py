"""The linear classifier: its design, its fit, and folding it into tables.

Three blocks of columns, each row of length about 1 in the first two:

    tokens     1 / sqrt(U) for each of the U distinct tokens
    pairs      1 / sqrt(P) for each of the P distinct pair buckets
    embedding  scale * (sum of the distinct tokens' vectors / sqrt(U) - mean over prompts)

Vectors of tokens are those of `vectors.py`. The third block is linear in the first, so both fold into
one weight a token. What few prompts say about single tokens is mostly chance, while the embedding
carries it over to tokens of like meaning: its block is the longer, the fewer prompts there are
(`dense_length`). The mean over prompts only moves the bias; subtracting it makes the optimisation
well-conditioned.

Shapes: N prompts, V vocabulary, B buckets, D domains, K width of a token's vector, T token columns
and Q pair columns that occur.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.embedding import EmbeddingRows
from deltamux.router.features import NUM_BUCKETS, Ids, distinct
from deltamux.router.metrics import Labels
from deltamux.router.tables import Floats, Probabilities, Tables
from deltamux.router.vectors import TokenVectors, token_vectors

#: Inverse strength of the L2 penalty, relative to a prompt's weight: scikit-learn's `C`.
INVERSE_PENALTY: Final = 5.0
#: A pair seen in a single prompt says nothing about other prompts.
MIN_PAIR_PROMPTS: Final = 2
#: Labelled prompts of a domain at which a row of the embedding's block is twice as long as the
#: others. On training files 2 instead of 1 gains one point of bare prompts with 16 a domain, costs
#: half a point of whole prompts with 64, and half a point of bare prompts with 400.
FEW_PROMPTS: Final = 16
_MAX_ITERATIONS: Final = 1000
#: Score of a domain without prompts.
_UNSEEN: Final = -20.0


@dataclass(frozen=True)
class Design:
    """Training features, and what is needed to fold weights on them.

    Attributes:
        columns: CSR float32 [N, T + Q + K].
        tokens: Int64 [T], token id of each column.
        pairs: Int64 [Q], bucket of each column.
        vectors: The tokens' vectors, scale included; None without an embedding.
        offset: Float32 [K], what was subtracted from the embedding block; K = 0 likewise.
    """

    columns: Any
    tokens: Ids
    pairs: Ids
    vectors: TokenVectors | None
    offset: Floats


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


def dense_length(prompts_per_domain: float) -> float:
    """Return the mean length of a row of the embedding block: 2 with 16 prompts, 1 with many."""
    return 1.0 + FEW_PROMPTS / prompts_per_domain


def build_design(
    prompts: Sequence[Ids], embedding: EmbeddingRows | None, dense: float = 1.0
) -> Design:
    """Build the training features.

    Args:
        prompts: Bounded token ids of each prompt.
        embedding: The base's input embedding; None leaves its block out.
        dense: Mean length of a row of the embedding's block.
    """
    from scipy import sparse

    rows = [distinct(ids) for ids in prompts]
    tokens, token_block = _presence([row[0] for row in rows], min_prompts=1)
    pairs, pair_block = _presence([row[1] for row in rows], min_prompts=MIN_PAIR_PROMPTS)
    block = np.zeros((len(rows), 0), dtype=np.float32)
    vectors: TokenVectors | None = None
    offset = np.zeros(0, dtype=np.float32)
    if embedding is not None:
        vectors = token_vectors(embedding)
        summed = token_block @ vectors.gather(tokens)
        offset = summed.mean(axis=0)
        length = float(np.linalg.norm(summed - offset, axis=1).mean())
        scale = np.float32(dense / length if length > 0 else 1.0)
        offset *= scale
        block = summed * scale - offset
        vectors = TokenVectors(embedding, vectors.projection * scale, vectors.shift * scale)
    blocks = [token_block, pair_block, sparse.csr_array(block)]
    columns = sparse.hstack(blocks, format="csr", dtype=np.float32)
    return Design(columns, tokens, pairs, vectors, offset)


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
