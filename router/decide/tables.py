"""The folded classifier: two tables, a bias, and the sums that decide.

A linear classifier's score is a sum over its features, so everything that depends on a token alone
(its own weight, and its input-embedding row times the embedding's weights) can be added up once per
token when the router is fitted:

    score(prompt) = bias + sum over distinct tokens t of tokens[t] / sqrt(U)
                         + sum over distinct pair buckets b of pairs[b] / sqrt(P)
    probability   = softmax(score / temperature)

Shapes: V tokens of the vocabulary, B buckets, D domains, U and P distinct tokens and buckets.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltamux.router.decide.features import Ids, distinct

Floats = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tables:
    """The classifier's weights; every row is centred over the domains, which softmax ignores.

    Attributes:
        tokens: Float32 [V, D].
        pairs: Float32 [B, D]; B is a power of two.
        bias: Float32 [D].
    """

    tokens: Floats
    pairs: Floats
    bias: Floats

    def scores(self, ids: Ids) -> Probabilities:
        """Return the scores of a prompt, float64 [D].

        Args:
            ids: Int64 [N], each in [0, V). No tokens at all leave the bias alone.
        """
        tokens, pairs = distinct(ids, len(self.pairs))
        total = self.bias.astype(np.float64)
        for table, rows in ((self.tokens, tokens), (self.pairs, pairs)):
            if rows.size:
                total += table.take(rows, axis=0).sum(axis=0) / np.sqrt(rows.size)
        return total


def softmax(scores: Probabilities, temperature: float = 1.0) -> Probabilities:
    """Return the softmax of scores / temperature over the last axis, float64, same shape."""
    scaled = scores / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    normalised: Probabilities = powers / powers.sum(axis=-1, keepdims=True)
    return normalised
