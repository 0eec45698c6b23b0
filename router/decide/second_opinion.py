"""The second opinion: a sentence encoder's vector beside the tables' scores.

Most prompts are plain to the tables, and the encoder costs a hundred times their time. So it is
asked only where the tables' largest probability stays below `ASK_BELOW`:

    opinion = softmax((scores / temperature + share * (vector S + b)) / temperature of the stack)

S [E, D] and b are a logistic regression on vectors alone, so this is a weighted product of two
opinions (Hinton 2002, "Training Products of Experts by Minimizing Contrastive Divergence"). The
share is the one with the least log loss on cross-validated scores of both, 0 among them: where the
vector does not help, the tables' scores stand.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.decide.policy import Mask
from deltamux.router.decide.tables import Floats, Probabilities, softmax
from deltamux.router.fit.calibration import fit_temperature
from deltamux.router.fit.crossval import Examples, folds
from deltamux.router.fit.head import TrainingSet, fit_head
from deltamux.router.fit.metrics import Labels

#: Largest probability of the tables below which the encoder is asked.
ASK_BELOW: Final = 0.995
#: Scale of a vector of length 1: the higher, the less its weights are penalised.
VECTOR_SCALE: Final = 4.0
#: Inverse strength of the L2 penalty, relative to a prompt's weight.
INVERSE_PENALTY: Final = 5.0
#: Shares of the vector's opinion that are tried.
SHARES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0)


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
    scores: Probabilities,
    vectors: Floats,
    examples: Examples,
    rows: Labels,
    *,
    asked: Mask,
    seed: int,
) -> tuple[Stack, Probabilities]:
    """Fit the second classifier on some examples.

    Args:
        scores: Float64 [n, D], held out, divided by the tables' temperature, of these examples.
        vectors: Float32 [n, E], likewise.
        examples: All examples.
        rows: Int64 [n], which of them.
        asked: Bool [n], those the encoder would be asked about: the share and the temperature are
            fitted on them, the classifier on all.
        seed: Of the folds.

    Returns:
        The classifier, and float64 [n, D] held-out scores, its temperature applied.
    """
    truth, weights = examples.truth[rows], examples.weights[rows]
    training = TrainingSet(vectors * VECTOR_SCALE, truth, weights, scores.shape[1])
    own = np.zeros(scores.shape)
    groups = examples.groups[examples.origins[rows]]
    for fold in folds(examples, seed):
        inside = np.isin(groups, fold)
        head = fit_head(training.take(np.flatnonzero(~inside)), INVERSE_PENALTY)
        own[inside] = head.scores(training.columns[inside])
    head = fit_head(training, INVERSE_PENALTY)
    if not asked.any():
        # Nothing is known of prompts like those it would be asked about.
        asked = np.ones(len(rows), dtype=np.bool_)
    share, temperature = _mix(scores[asked], own[asked], truth[asked], weights[asked])
    second = head.weights * (VECTOR_SCALE * share)
    stacked = np.concatenate([np.eye(scores.shape[1]), second]).astype(np.float32)
    stack = Stack(stacked, (head.bias * share).astype(np.float32), temperature)
    return stack, (scores + share * own) / temperature


def _mix(
    first: Probabilities, second: Probabilities, truth: Labels, weights: Probabilities
) -> tuple[float, float]:
    """Share of the second scores and temperature of the sum with the least log loss."""
    found = []
    for share in SHARES:
        mixed = first + share * second
        temperature = fit_temperature(mixed, truth)
        own = softmax(mixed, temperature)[np.arange(len(truth)), truth]
        found.append((float(-weights @ np.log(np.maximum(own, 1e-12))), share, temperature))
    return min(found)[1:]
