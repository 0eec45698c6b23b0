"""From probabilities to a choice: a pure function of numbers.

A specialist is a domain with an expert behind it. The rules, in order:

1. The last user turn alone overrides the conversation when its most probable domain is a specialist
   with at least `override_confidence` (and at least the threshold): people change the subject.
2. Otherwise the concatenated user turns decide: "why?" belongs to what was talked about before.
3. The most probable domain is routed to its expert when it is a specialist that reaches the
   threshold. In every other case the router abstains and the base answers.

The threshold is on the largest probability over the specialists rather than over all domains: a
prompt that the general domain surely owns must not look like a confident routing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltamux.router.tables import Probabilities

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Choice:
    """Which domain won, with what probability, and whether its expert answers.

    Attributes:
        domain: Index into the labels.
        confidence: Probability of that domain.
        routed: True where the domain's expert answers; False where the router abstains.
        probabilities: Float64 [D], the probabilities that decided (of the last turn after an
            override, of the conversation otherwise).
    """

    domain: int
    confidence: float
    routed: bool
    probabilities: Probabilities


def choose(
    conversation: Probabilities,
    last_turn: Probabilities | None,
    *,
    specialists: Mask,
    threshold: float,
    override_confidence: float,
) -> Choice:
    """Apply the rules.

    Args:
        conversation: Float64 [D], of the concatenated user turns.
        last_turn: Float64 [D], of the last user turn alone; None when it is the only one.
        specialists: Bool [D], True where a domain has an expert.
        threshold: Smallest probability with which a specialist is routed.
        override_confidence: Smallest probability with which the last turn alone decides.
    """
    if last_turn is not None:
        override = _judge(last_turn, specialists, max(threshold, override_confidence))
        if override.routed:
            return override
    return _judge(conversation, specialists, threshold)


def _judge(probabilities: Probabilities, specialists: Mask, threshold: float) -> Choice:
    """Rule 3 on one vector of probabilities."""
    domain = int(np.argmax(probabilities))
    confidence = float(probabilities[domain])
    routed = bool(specialists[domain]) and confidence >= threshold
    return Choice(domain, confidence, routed, probabilities)
