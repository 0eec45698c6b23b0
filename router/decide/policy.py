"""From probabilities to a choice: pure functions of numbers.

A specialist is a domain with an expert behind it. One vector of probabilities is judged so:

1. The most probable domain is routed to its expert when it is a specialist that reaches the
   threshold, or its own minimum where that is more. In every other case the router abstains and the
   base answers. The threshold is on the largest probability over the specialists rather than over
   all domains: a prompt that the general domain surely owns must not look like a confident routing.
2. The conversation's expert is left only on clear evidence: another domain must be ahead of it by
   `hysteresis`, and its own threshold is lower by as much.
3. Among experts within `margin` of the winner, one that is on the device goes first: a swap costs
   every request of the batch. The margin is 0 unless the server's configuration sets one.

A conversation is followed turn by turn. A turn that alone is judged a specialist with at least
`override_confidence` opens a new topic: people change the subject. Every other turn is judged
together with the turns of its topic: "why?" belongs to what was talked about before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.decide.tables import Mask, Probabilities

# Turns that are followed one by one; those before them are one topic. Chosen, not measured.
FOLLOWED_TURNS: Final = 8


@dataclass(frozen=True)
class Rules:
    """What a choice depends on beside the probabilities.

    Attributes:
        specialists: Bool [D], True where a domain has an expert.
        thresholds: Float64 [D], smallest probability with which each specialist is routed.
        override_confidence: Smallest probability with which a turn alone opens a new topic.
        hysteresis: By how much the conversation's expert may fall behind before it is left.
        margin: How far behind the winner an expert on the device may be, and still answer.
        resident: Bool [D], True where a domain's expert is on the device; None: nobody knows.
    """

    specialists: Mask
    thresholds: Probabilities
    override_confidence: float
    hysteresis: float = 0.0
    margin: float = 0.0
    resident: Mask | None = None


@dataclass(frozen=True)
class Choice:
    """Which domain won, with what probability, and whether its expert answers.

    Attributes:
        domain: Index into the labels.
        confidence: Probability of that domain.
        routed: True where the domain's expert answers; False where the router abstains.
        probabilities: Float64 [D], the probabilities that decided.
        first_turn: First turn of the topic that decided.
    """

    domain: int
    confidence: float
    routed: bool
    probabilities: Probabilities
    first_turn: int = 0


def follow(num_turns: int, score: Callable[[int, int], Probabilities], rules: Rules) -> Choice:
    """Choose for the last turn of a conversation.

    Args:
        num_turns: At least 1.
        score: Given first and last turn, the probabilities of these turns together, float64 [D].
        rules: See above.
    """
    start = max(0, num_turns - FOLLOWED_TURNS)
    choice = judge(score(0, start), rules)
    for turn in range(start + 1, num_turns):
        alone = judge(score(turn, turn), rules)
        if alone.routed and alone.confidence >= rules.override_confidence:
            choice = _since(alone, turn)
            continue
        current = choice.domain if choice.routed else None
        first = choice.first_turn
        choice = _since(judge(score(first, turn), rules, current), first)
    return choice


def judge(probabilities: Probabilities, rules: Rules, current: int | None = None) -> Choice:
    """Choose on one vector of probabilities.

    Args:
        probabilities: Float64 [D].
        rules: See above.
        current: The domain whose expert has the conversation; None for the base.
    """
    domain = int(np.argmax(probabilities))
    if current is not None:
        own = probabilities[current]
        near = probabilities[domain] < own + rules.hysteresis or domain == current
        if near and own >= rules.thresholds[current] - rules.hysteresis:
            return Choice(current, float(own), True, probabilities)
    routed = bool(rules.specialists[domain] and probabilities[domain] >= rules.thresholds[domain])
    if routed:
        domain = _resident(domain, probabilities, rules)
    return Choice(domain, float(probabilities[domain]), routed, probabilities)


def _resident(domain: int, probabilities: Probabilities, rules: Rules) -> int:
    """Rule 3."""
    if rules.resident is None or rules.margin <= 0 or rules.resident[domain]:
        return domain
    near = rules.specialists & rules.resident
    near &= probabilities >= probabilities[domain] - rules.margin
    return int(np.argmax(np.where(near, probabilities, -1.0))) if near.any() else domain


def _since(choice: Choice, turn: int) -> Choice:
    """The choice, with the first turn of its topic."""
    return Choice(
        choice.domain, choice.confidence, choice.routed, choice.probabilities, first_turn=turn
    )
