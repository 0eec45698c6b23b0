import numpy as np
import pytest

from deltamux.router.policy import choose

# Domains: math, sql, general.
SPECIALISTS = np.array([True, True, False])


def decide(conversation, last_turn=None, threshold=0.6, override=0.95):
    choice = choose(
        np.array(conversation),
        None if last_turn is None else np.array(last_turn),
        specialists=SPECIALISTS,
        threshold=threshold,
        override_confidence=override,
    )
    return choice.domain, round(choice.confidence, 6), choice.routed


def test_a_specialist_at_the_threshold_is_routed():
    assert decide([0.6, 0.2, 0.2]) == (0, 0.6, True)


def test_a_specialist_under_the_threshold_is_not():
    assert decide([0.59, 0.2, 0.21]) == (0, 0.59, False)


def test_the_general_domain_is_never_routed():
    assert decide([0.01, 0.01, 0.98]) == (2, 0.98, False)


def test_a_specialist_behind_the_general_domain_is_not_routed():
    assert decide([0.45, 0.05, 0.5], threshold=0.3) == (2, 0.5, False)


def test_a_confident_last_turn_overrides_the_conversation():
    assert decide([0.9, 0.05, 0.05], last_turn=[0.01, 0.96, 0.03]) == (1, 0.96, True)


@pytest.mark.parametrize("last_turn", [[0.03, 0.94, 0.03], [0.01, 0.01, 0.98]])
def test_another_last_turn_leaves_the_conversation_to_decide(last_turn):
    assert decide([0.9, 0.05, 0.05], last_turn) == (0, 0.9, True)


def test_an_override_must_reach_the_threshold_too():
    assert decide([0.1, 0.1, 0.8], [0.97, 0.02, 0.01], threshold=0.99) == (2, 0.8, False)


def test_the_probabilities_are_those_that_decided():
    last = np.array([0.01, 0.96, 0.03])
    choice = choose(
        np.array([0.9, 0.05, 0.05]),
        last,
        specialists=SPECIALISTS,
        threshold=0.5,
        override_confidence=0.95,
    )
    assert choice.probabilities is last
