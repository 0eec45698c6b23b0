import numpy as np
import pytest

from deltamux.router.decide.policy import FOLLOWED_TURNS, Rules, follow, judge

# Domains: math, sql, general.
SPECIALISTS = np.array([True, True, False])


def make_rules(threshold=0.6, override=0.95, **options):
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=float), 3)
    return Rules(SPECIALISTS, thresholds, override, **options)


def decide(conversation, last_turn=None, current=None, **options):
    """Of one turn, or of two whose first one is `conversation` without the last."""
    rules = make_rules(**options)
    if last_turn is None:
        choice = judge(np.array(conversation), rules, current)
    else:
        scores = {(0, 0): conversation, (1, 1): last_turn, (0, 1): conversation}
        choice = follow(2, lambda i, j: np.array(scores[i, j]), rules)
    return choice.domain, round(choice.confidence, 6), choice.routed


def test_a_specialist_at_the_threshold_is_routed():
    assert decide([0.6, 0.2, 0.2]) == (0, 0.6, True)


def test_a_specialist_under_the_threshold_is_not():
    assert decide([0.59, 0.2, 0.21]) == (0, 0.59, False)


def test_a_domain_has_its_own_minimum():
    assert decide([0.2, 0.7, 0.1], threshold=[0.6, 0.8, 0.6]) == (1, 0.7, False)
    assert decide([0.7, 0.2, 0.1], threshold=[0.6, 0.8, 0.6]) == (0, 0.7, True)


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


def test_the_conversations_expert_is_left_on_clear_evidence_only():
    assert decide([0.3, 0.65, 0.05], current=0, hysteresis=0.4) == (0, 0.3, True)
    assert decide([0.2, 0.75, 0.05], current=0, hysteresis=0.4) == (1, 0.75, True)
    assert decide([0.3, 0.65, 0.05], current=0, hysteresis=0.0) == (1, 0.65, True)


def test_the_conversations_expert_is_left_when_little_speaks_for_it():
    assert decide([0.1, 0.45, 0.45], current=0, hysteresis=0.4) == (1, 0.45, False)


def test_a_conversation_goes_on_from_where_the_topic_changed():
    asked = []

    def score(first, last):
        asked.append((first, last))
        known = {(0, 0): [0.9, 0.05, 0.05], (1, 1): [0.01, 0.97, 0.02], (2, 2): [0.1, 0.1, 0.8]}
        return np.array(known.get((first, last), [0.0, 0.9, 0.1]))

    choice = follow(3, score, make_rules())
    assert (choice.domain, choice.routed, choice.first_turn) == (1, True, 1)
    assert (1, 2) in asked
    assert (0, 2) not in asked


def test_a_long_conversation_is_followed_over_its_last_turns():
    asked = []

    def score(first, last):
        asked.append((first, last))
        return np.array([0.9, 0.05, 0.05])

    follow(100, score, make_rules(override=1.1))
    assert asked[0] == (0, 100 - FOLLOWED_TURNS)
    assert len(asked) == 2 * FOLLOWED_TURNS - 1


def test_among_near_experts_the_resident_one_answers():
    resident = np.array([False, True, False])
    near = {"threshold": 0.4, "resident": resident}
    assert decide([0.5, 0.45, 0.05], margin=0.1, **near) == (1, 0.45, True)
    assert decide([0.5, 0.35, 0.15], margin=0.1, **near) == (0, 0.5, True)
    assert decide([0.5, 0.45, 0.05], margin=0.0, **near) == (0, 0.5, True)
    # A domain without an expert is on no device.
    nothing = {"threshold": 0.4, "resident": np.array([False, False, True])}
    assert decide([0.5, 0.0, 0.5], margin=0.1, **nothing) == (0, 0.5, True)


def test_the_probabilities_are_those_that_decided():
    last = np.array([0.01, 0.96, 0.03])
    choice = follow(2, lambda i, _: last if i else np.array([0.9, 0.1, 0.0]), make_rules())
    assert choice.probabilities is last
