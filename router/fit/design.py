"""The training features: the meaning of each prompt as a vector, its wording as sparse columns.

    wording  weight / sqrt(U) for each of the U distinct tokens, 1 / sqrt(P) for each of the P
             distinct pair buckets
    meaning  with an encoder the sentence vector, and beside it
             scale * (sum of the distinct tokens' vectors / sqrt(U) - mean over prompts),
             the scale such that rows have length 1 in the mean

Vectors and weights of tokens are those of `vectors.py`: words of every prompt say little, in either.

Shapes: N examples, V vocabulary, B buckets, K width of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.features import NUM_BUCKETS, Ids, distinct
from deltamux.router.decide.tables import Floats, Mask, Probabilities, strength
from deltamux.router.fit.embedding import EmbeddingRows
from deltamux.router.fit.metrics import Labels
from deltamux.router.fit.vectors import TokenVectors, token_vectors, token_weights

# A pair seen in a single example says nothing about other prompts. Chosen, not measured.
MIN_PAIR_EXAMPLES: Final = 2
# A token of so many labelled prompts is known. Chosen, not measured.
MIN_TOKEN_PROMPTS: Final = 2


@dataclass(frozen=True)
class Design:
    """Training features, and what is needed to fold weights on them.

    Attributes:
        tokens: CSR float32 [N, V], weighted.
        pairs: CSR float32 [N, B].
        meaning: Float32 [N, E + K]: E columns of the sentence vector, none without an encoder; K of
            the tokens' vectors, none without an embedding.
        vectors: The tokens' vectors, scale included; None without an embedding.
        offset: Float32 [K], what was subtracted from the meaning's last columns.
        weights: Float32 [V, 1], of each token.
        labelled: The first so many examples are the user's.
    """

    tokens: Any
    pairs: Any
    meaning: Floats
    vectors: TokenVectors | None
    offset: Floats
    weights: Floats
    labelled: int

    def trust(self, rows: Labels) -> Floats:
        """Return the weight of each token, and the same where labelled examples among rows know it.

        Returns:
            Float32 [V, 2], as `Tables.trust`.
        """
        own = self.tokens[rows[rows < self.labelled]]
        counts = np.bincount(own.indices, minlength=self.tokens.shape[1])[:, None]
        return np.hstack([self.weights, self.weights * (counts >= MIN_TOKEN_PROMPTS)])

    def strengths(self, rows: Labels, trust: Floats) -> Probabilities:
        """Return how much the wording of each of some rows counts, float64 [n, 1].

        Args:
            rows: Int64 [n].
            trust: Float32 [V, 2].
        """
        present = self.tokens[rows]
        present.data = np.ones_like(present.data)
        weight, known = np.asarray(present @ trust, dtype=np.float64).T
        found: Probabilities = strength(known, np.maximum(weight, 1e-12))[:, None]
        return found

    def known(self, rows: Labels) -> Mask:
        """Return which buckets enough of some examples have, bool [B]."""
        counts = np.bincount(self.pairs[rows].indices, minlength=self.pairs.shape[1])
        return np.asarray(counts >= MIN_PAIR_EXAMPLES)


def build_design(
    prompts: Sequence[Ids],
    vocab_size: int,
    labelled: int,
    *,
    embedding: EmbeddingRows | None = None,
    sentences: Floats | None = None,
) -> Design:
    """Build the training features.

    Args:
        prompts: Bounded token ids of each example.
        vocab_size: V.
        labelled: The first so many examples are the user's; tokens are counted among them.
        embedding: The base's input embedding; None where there is none.
        sentences: Float32 [N, E], sentence vectors of the examples; None without an encoder.
    """
    rows = [distinct(ids) for ids in prompts]
    tokens = _presence([row[0] for row in rows], vocab_size)
    pairs = _presence([row[1] for row in rows], NUM_BUCKETS)
    weights = token_weights(np.bincount(tokens[:labelled].indices, minlength=vocab_size))
    weighted = tokens.multiply(weights.T).tocsr()
    told = np.zeros((len(rows), 0), np.float32) if sentences is None else sentences
    if embedding is None:
        return Design(weighted, pairs, told, None, np.zeros(0, np.float32), weights, labelled)
    vectors = token_vectors(embedding, weights)
    used = np.unique(tokens.indices)
    summed = np.asarray(tokens[:, used] @ vectors.gather(used))
    offset = summed.mean(axis=0)
    length = float(np.linalg.norm(summed - offset, axis=1).mean())
    scale = np.float32(1.0 / length if length > 0 else 1.0)
    scaled = TokenVectors(
        embedding, vectors.projection * scale, vectors.shift * scale, vectors.weights
    )
    meaning = np.hstack([told, (summed - offset) * scale])
    return Design(weighted, pairs, meaning, scaled, offset * scale, weights, labelled)


def _presence(rows: Sequence[Ids], width: int) -> Any:
    """CSR float32 [N, width] with 1 / sqrt(row length) where an item occurs."""
    from scipy import sparse

    lengths = np.array([len(row) for row in rows])
    values = np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths).astype(np.float32)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_array((values, np.concatenate(rows), ends), shape=(len(rows), width))
