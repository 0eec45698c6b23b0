"""The classifier: what a prompt means, corrected by how it is worded.

    score(prompt) = bias + sum over distinct tokens t of tokens[t] / sqrt(U)
                         + sum over distinct pair buckets b of pairs[b] / sqrt(P)
                         + vector(prompt) @ meaning            with features "encoder" alone
    probability   = softmax(score / temperature)

Meaning is a linear function of a vector: of the sentence encoder's, or of the mean of the base's
input-embedding rows, which folds into one row a token. It is fitted first and alone. The wording (rows
of tokens and pairs) is fitted on what the meaning leaves unexplained, as in boosting (Friedman 2001,
"Greedy Function Approximation"), so it cannot vote down a meaning that explains the training prompts;
and of the tokens, those of every prompt count little (`fit/vectors.py`).

Shapes: V tokens of the vocabulary, B buckets, D domains, E width of a sentence vector, U and P
distinct tokens and buckets of a prompt.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltamux.router.decide.features import Ids, distinct

Floats = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tables:
    """The classifier's weights; softmax ignores what a row adds to all domains alike.

    Attributes:
        tokens: Float32 [V, D].
        pairs: Float32 [B, D]; B is a power of two.
        bias: Float32 [D].
        meaning: Float32 [E, D], of a sentence vector; None with features "default".
    """

    tokens: Floats
    pairs: Floats
    bias: Floats
    meaning: Floats | None = None

    def scores(self, ids: Ids, vector: Floats | None = None) -> Probabilities:
        """Return the scores of a prompt, float64 [D].

        Args:
            ids: Int64 [N], each in [0, V). No tokens at all leave bias and meaning alone.
            vector: Float32 [E], with features "encoder".
        """
        tokens, pairs = distinct(ids, len(self.pairs))
        total = self.bias.astype(np.float64)
        if self.meaning is not None and vector is not None:
            total += vector @ self.meaning
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
