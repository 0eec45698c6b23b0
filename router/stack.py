"""The second opinion: a sentence encoder's vector beside the tables' scores.

Most prompts are plain to the tables, and the encoder costs a hundred times their time. So it is
asked only where the tables' largest probability stays below `ASK_BELOW`:

    opinion = softmax((scores / temperature) A + vector S + b) / temperature of the stack

A [D, D], S [E, D] and b are a logistic regression on cross-validated scores, as stacking needs
(Wolpert 1992, "Stacked Generalization"): scores of prompts that the tables were fitted on would
look better than they are. Their columns are scaled up, so that the penalty is on the vector.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.crossval import Examples, folds
from deltamux.router.head import Head, balance, regress
from deltamux.router.metrics import Labels
from deltamux.router.policy import Mask
from deltamux.router.tables import Floats, Probabilities, softmax

#: Largest probability of the tables below which the encoder is asked.
ASK_BELOW: Final = 0.995
#: Weight of a vector of length 1 beside the scores: the higher, the less its weights are penalised.
VECTOR_SCALE: Final = 4.0
#: The same of the scores.
SCORE_SCALE: Final = 4.0
#: Inverse strength of the L2 penalty, relative to a prompt's weight.
INVERSE_PENALTY: Final = 0.5


@dataclass(frozen=True)
class Stack:
    """The second classifier.

    Attributes:
        weights: Float32 [D + E, D], of the tables' calibrated scores and of the vector.
        bias: Float32 [D].
        temperature: Divides its scores before the softmax.
        ask_below: Largest probability of the tables below which it is asked.
    """

    weights: Floats
    bias: Floats
    temperature: float
    ask_below: float = ASK_BELOW

    def probabilities(self, scores: Probabilities, vector: Floats) -> Probabilities:
        """Return the calibrated probabilities, float64 [..., D].

        Args:
            scores: Float64 [..., D], of the tables, divided by their temperature.
            vector: Float32 [..., E], of length 1.
        """
        columns = np.concatenate([scores, vector], axis=-1)
        opinion = np.asarray(columns @ self.weights + self.bias, dtype=np.float64)
        return softmax(opinion, self.temperature)


def fit_stack(
    scores: Probabilities, vectors: Floats, examples: Examples, rows: Labels, seed: int
) -> tuple[Stack, Probabilities]:
    """Fit the second classifier on some examples.

    Args:
        scores: Float64 [n, D], held out, divided by the tables' temperature, of these examples.
        vectors: Float32 [n, E], likewise.
        examples: All examples.
        rows: Int64 [n], which of them.
        seed: Of the folds.

    Returns:
        The classifier, its temperature still 1, and float64 [n, D] held-out scores.
    """
    truth, weights = examples.truth[rows], examples.weights[rows]
    scale = np.repeat([SCORE_SCALE, VECTOR_SCALE], [scores.shape[1], vectors.shape[1]])
    columns = np.concatenate([scores, vectors], axis=1) * scale
    held_out = np.zeros(scores.shape)
    groups = examples.groups[examples.origins[rows]]

    def fit(chosen: Mask) -> Head:
        balanced = balance(truth[chosen], weights[chosen])
        return regress(columns[chosen], truth[chosen], balanced, INVERSE_PENALTY)

    for fold in folds(examples, seed):
        inside = np.isin(groups, fold)
        held_out[inside] = fit(~inside).scores(columns[inside])
    head = fit(np.ones(len(rows), dtype=np.bool_))
    fitted = (head.weights * scale[:, None]).astype(np.float32)
    return Stack(fitted, head.bias.astype(np.float32), 1.0), held_out
