"""Vectors of tokens, made from the base's input embedding.

A token's vector is its embedding row, scaled to length 1, centred, and partly whitened: divided by
a power of the variance along each principal direction, because a few directions that only
tell frequent tokens from rare ones would otherwise outweigh the rest (Mu and Viswanath 2018,
"All-but-the-Top", arXiv:1702.01417). It is weighted by log(1 + id)^2: the ids of a byte-pair
vocabulary are in the order of its merges, so frequent tokens, which say little, come first (as in
Model2Vec, which assumes the same order).

Shapes: V vocabulary, H embedding width, K <= H kept directions, D domains.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.decide.features import Ids
from deltamux.router.decide.tables import Floats
from deltamux.router.fit.embedding import EmbeddingRows

#: Wider embeddings keep this many principal directions; it bounds the time of a fit.
MAX_WIDTH: Final = 768
#: Power of the variance that a principal direction is divided by; 1/2 would whiten it.
WHITENING: Final = 0.35
#: Directions with less than this part of the largest variance are rounding.
_LEAST_VARIANCE: Final = 1e-6


@dataclass(frozen=True)
class TokenVectors:
    """Vectors that are made when they are needed: a large vocabulary's would take gigabytes.

    Attributes:
        embedding: The input embedding.
        projection: Float32 [H, K].
        shift: Float32 [K], subtracted after the projection.
    """

    embedding: EmbeddingRows
    projection: Floats
    shift: Floats

    def gather(self, tokens: Ids) -> Floats:
        """Return the vectors of tokens, float32 [len(tokens), K]; zeros beyond the embedding."""
        vectors = self.embedding.gather(tokens) @ self.projection - self.shift
        vectors *= _ranks(tokens)
        vectors[tokens >= self.embedding.num_rows] = 0.0
        return vectors

    def project(self, weights: Floats) -> Floats:
        """Return all vectors [V, K] @ weights [K, D], float32 [V, D]."""
        products = self.embedding.project(self.projection @ weights) - self.shift @ weights
        products *= _ranks(np.arange(self.embedding.num_rows))
        return products


def token_vectors(embedding: EmbeddingRows) -> TokenVectors:
    """Find the principal directions and how far each is scaled."""
    mean, covariance = embedding.moments()
    variances, directions = np.linalg.eigh(covariance.astype(np.float64))
    kept = np.argsort(variances)[::-1][:MAX_WIDTH]
    kept = kept[variances[kept] > _LEAST_VARIANCE * max(float(variances.max()), 1e-30)]
    projection = (directions[:, kept] * variances[kept] ** -WHITENING).astype(np.float32)
    return TokenVectors(embedding, projection, mean @ projection)


def _ranks(tokens: Ids) -> Floats:
    """Float32 [len(tokens), 1], the weight of each token."""
    weights: Floats = np.log1p(tokens.astype(np.float32))[:, None] ** 2
    return weights
