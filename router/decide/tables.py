"""The classifier: what a prompt means, corrected by how it is worded.

    meaning(prompt) = sum over distinct tokens t of tokens[t] / sqrt(U)
                      + vector(prompt) @ meaning                 with features "encoder" alone
    wording(prompt) = sum over distinct tokens t of words[t] / sqrt(U)
                      + sum over distinct pair buckets b of pairs[b] / sqrt(P)
    score(prompt)   = bias + meaning(prompt) + strength(prompt) * wording(prompt)
    probability     = softmax(score / temperature)

Meaning is a linear function of the mean of the base's input-embedding rows, which folds into one row
a token, and of the sentence encoder's vector. It is fitted first and alone. The wording is fitted on
what the meaning leaves unexplained, as in boosting (Friedman 2001, "Greedy Function Approximation").
It counts as far as the training prompts knew the prompt's words:

    strength(prompt) = 2 * (weight of its known distinct tokens / weight of its distinct tokens) ** 3

with the weights of `fit/vectors.py`, by which the tokens of every prompt count little. A prompt in
words that nobody labelled is judged by its meaning.

Shapes: V tokens of the vocabulary, B buckets, D domains, E width of a sentence vector, U and P
distinct tokens and buckets of a prompt.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltamux.router.decide.features import Ids, distinct

Floats = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Strength of the wording. Chosen on held-out kinds of training prompts: benchmarks/routing/kinds.py.
GAIN: Final = 2.0
POWER: Final = 3.0


@dataclass(frozen=True)
class Tables:
    """The classifier's weights; softmax ignores what a row adds to all domains alike.

    Attributes:
        tokens: Float32 [V, D], meaning of each token.
        pairs: Float32 [B, D], wording; B is a power of two.
        bias: Float32 [D].
        meaning: Float32 [E, D], of a sentence vector; None with features "default".
        words: Float32 [V, D], wording of each token; None: `tokens` has it.
        trust: Float32 [V, 2], a token's weight, and the same where training prompts knew the token,
            else 0; None: the wording always counts once.
    """

    tokens: Floats
    pairs: Floats
    bias: Floats
    meaning: Floats | None = None
    words: Floats | None = None
    trust: Floats | None = None

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
        total += _mean(self.tokens, tokens)
        wording = _mean(self.pairs, pairs)
        if self.words is not None:
            wording = wording + _mean(self.words, tokens)
        total += self.strength(tokens) * wording
        return total

    def strength(self, tokens: Ids) -> float:
        """Return how much the wording of a prompt counts, in [0, 2].

        Args:
            tokens: Int64 [U], the prompt's distinct tokens.
        """
        if self.trust is None:
            return 1.0
        weight, known = self.trust.take(tokens, axis=0).sum(axis=0).tolist()
        return strength(known, weight) if weight > 0 else 0.0


def strength(known: Any, weight: Any) -> Any:
    """Return how much wordings count, given the weights of their known and of all their tokens."""
    return GAIN * (known / weight) ** POWER


def _mean(table: Floats, rows: Ids) -> Floats:
    """The sum of rows over the square root of their number, float32 [D]; zeros without rows."""
    total: Floats = table.take(rows, axis=0).sum(axis=0)
    return total / np.float32(np.sqrt(max(rows.size, 1)))


def softmax(scores: Probabilities, temperature: float = 1.0) -> Probabilities:
    """Return the softmax of scores / temperature over the last axis, float64, same shape."""
    scaled = scores / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    normalised: Probabilities = powers / powers.sum(axis=-1, keepdims=True)
    return normalised
