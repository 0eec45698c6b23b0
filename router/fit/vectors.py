"""Vectors of tokens, made from the base's input embedding.

A token's vector is its embedding row, scaled to length 1, centred, and partly whitened: divided by
a power of the variance along each principal direction, because a few directions that only
tell frequent tokens from rare ones would otherwise outweigh the rest (Mu and Viswanath 2018,
"All-but-the-Top", arXiv:1702.01417). It is weighted by a / (a + frequency) of the token among the
training prompts (Arora, Liang and Ma 2017, "A Simple but Tough-to-Beat Baseline for Sentence
Embeddings"): words of every sentence and the frames of a data set say how a prompt is put, the rare
ones what it is about.

Shapes: V vocabulary, H embedding width, K <= H kept directions, D domains.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.decide.features import Ids
from deltamux.router.decide.tables import Floats
from deltamux.router.fit.embedding import EmbeddingRows
from deltamux.router.fit.metrics import Labels

# Wider embeddings keep this many principal directions; it bounds the time of a fit.
MAX_WIDTH: Final = 768
# Power of the variance that a principal direction is divided by; 1/2 would whiten it.
# Chosen, not measured.
WHITENING: Final = 0.35
# The frequency at which a token counts half; the mean frequency, where that is more. Chosen, not
# measured.
HALF_FREQUENCY: Final = 1e-3
# Directions with less than this part of the largest variance are rounding.
_LEAST_VARIANCE: Final = 1e-6


@dataclass(frozen=True)
class TokenVectors:
    """Vectors that are made when they are needed: a large vocabulary's would take gigabytes.

    Attributes:
        embedding: The input embedding.
        projection: Float32 [H, K].
        shift: Float32 [K], subtracted after the projection.
        weights: Float32 [V, 1], of each token.
    """

    embedding: EmbeddingRows
    projection: Floats
    shift: Floats
    weights: Floats

    def gather(self, tokens: Ids) -> Floats:
        """Return the vectors of tokens, float32 [len(tokens), K]; zeros beyond the embedding."""
        vectors = self.embedding.gather(tokens) @ self.projection - self.shift
        vectors *= self.weights[tokens]
        vectors[tokens >= self.embedding.num_rows] = 0.0
        return vectors

    def project(self, weights: Floats) -> Floats:
        """Return all vectors [V, K] @ weights [K, D], float32 [V, D]."""
        products = self.embedding.project(self.projection @ weights) - self.shift @ weights
        products *= self.weights[: self.embedding.num_rows]
        return products


def token_vectors(embedding: EmbeddingRows, weights: Floats) -> TokenVectors:
    """Find the principal directions and how far each is scaled.

    Args:
        embedding: The input embedding.
        weights: Float32 [V, 1], of each token.
    """
    mean, covariance = embedding.moments()
    variances, directions = np.linalg.eigh(covariance.astype(np.float64))
    kept = np.argsort(variances)[::-1][:MAX_WIDTH]
    kept = kept[variances[kept] > _LEAST_VARIANCE * max(float(variances.max()), 1e-30)]
    projection = (directions[:, kept] * variances[kept] ** -WHITENING).astype(np.float32)
    return TokenVectors(embedding, projection, mean @ projection, weights)


def token_weights(counts: Labels) -> Floats:
    """Return the weight of each token, float32 [V, 1].

    Args:
        counts: Int64 [V], training prompts that hold each token.
    """
    frequency = counts / max(1, int(counts.sum()))
    half = max(HALF_FREQUENCY, 1 / max(1, int(np.count_nonzero(counts))))
    weights: Floats = (half / (half + frequency)).astype(np.float32)[:, None]
    return weights
