"""The classifier: what a prompt means, corrected by how it is worded, as far as the wording is known.

    score(prompt) = bias + meaning(prompt) + known(prompt)^trust * wording(prompt)

    wording  = sum over distinct tokens t of tokens[t] / sqrt(U)
             + sum over distinct pair buckets b of pairs[b] / sqrt(P)
    meaning  = sum over distinct tokens t of meaning[t] / sqrt(U)     with features "default"
             = vector(prompt) @ meaning                               with features "encoder"
    known    = part of the P buckets that training prompts share
    probability = softmax(score / temperature)

Meaning is a linear function of a vector: of the sentence encoder's, or of the mean of the base's
input-embedding rows, which folds into one row a token. It is fitted first and alone. The wording is
fitted on what the meaning leaves unexplained, as in boosting (Friedman 2001, "Greedy Function
Approximation"), so it cannot vote down a meaning that explains the training prompts; and where a
prompt's pairs are unknown, it has little say.

Shapes: V tokens of the vocabulary, B buckets, D domains, E width of a sentence vector, U and P
distinct tokens and buckets of a prompt.
"""

from dataclasses import dataclass, field

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
        pairs: Float32 [B, D]; B is a power of two. A row of zeros is a bucket nobody knows.
        meaning: Float32 [V, D], or [E, D] of a sentence vector.
        bias: Float32 [D].
        trust: Power of the known part; 0 lets the wording count fully.
        known: Bool [B], which buckets training prompts share.
    """

    tokens: Floats
    pairs: Floats
    meaning: Floats
    bias: Floats
    trust: float = 0.0
    known: Mask = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", self.pairs.any(axis=1))

    def scores(self, ids: Ids, vector: Floats | None = None) -> Probabilities:
        """Return the scores of a prompt, float64 [D].

        Args:
            ids: Int64 [N], each in [0, V). No tokens at all leave the bias alone.
            vector: Float32 [E], with features "encoder".
        """
        tokens, pairs = distinct(ids, len(self.pairs))
        total = self.bias.astype(np.float64)
        if vector is not None:
            total += vector @ self.meaning
        if not tokens.size:
            return total
        per_token = 1 / np.sqrt(tokens.size)
        if vector is None:
            total += self.meaning.take(tokens, axis=0).sum(axis=0) * per_token
        share = self.share(pairs)
        if share > 0:
            wording = self.tokens.take(tokens, axis=0).sum(axis=0) * per_token
            wording += self.pairs.take(pairs, axis=0).sum(axis=0) / np.sqrt(pairs.size)
            total += share * wording
        return total

    def share(self, pairs: Ids) -> float:
        """Return what the wording counts, in [0, 1]; a single token has no pair, and counts nothing."""
        if not pairs.size:
            return 0.0
        part = float(np.count_nonzero(self.known.take(pairs)) / pairs.size)
        return float(part**self.trust)


def softmax(scores: Probabilities, temperature: float = 1.0) -> Probabilities:
    """Return the softmax of scores / temperature over the last axis, float64, same shape."""
    scaled = scores / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    normalised: Probabilities = powers / powers.sum(axis=-1, keepdims=True)
    return normalised
