import numpy as np
import pytest

from deltamux.router.decide.tables import softmax
from deltamux.router.fit.calibration import (
    MAX_STRAY,
    fit_temperature,
    fit_threshold,
    kept_threshold,
    threshold_for,
    wrong_expert,
)
from deltamux.router.fit.metrics import calibration_error, macro_f1, quality
from deltamux.router.report.curves import reliability, risk_coverage


def draw(scores, seed=0):
    """Sample a label for every row from softmax(scores)."""
    uniform = np.random.default_rng(seed).random((len(scores), 1))
    return (softmax(scores).cumsum(axis=1) < uniform).sum(axis=1).clip(max=scores.shape[1] - 1)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperature_recovers_the_factor_by_which_scores_are_off(factor):
    scores = np.random.default_rng(1).normal(size=(20_000, 4)) * 2
    # 20,000 draws fix the temperature to about one per cent.
    assert fit_temperature(scores * factor, draw(scores)) == pytest.approx(factor, rel=0.04)


def test_perfectly_separated_scores_keep_a_finite_temperature():
    truth = np.arange(90) % 3
    temperature = fit_temperature(np.eye(3)[truth], truth)
    confidence = softmax(np.eye(3)[truth], temperature).max()
    # Smoothed target: (30 + 1) / (30 + 2).
    assert confidence == pytest.approx(31 / 32, abs=1e-6)


def test_threshold_keeps_the_asked_share_of_own_prompts():
    best = np.linspace(0.5, 0.9, 101)
    probabilities = np.stack([best, 1 - best], axis=1)
    truth = np.zeros(101, dtype=np.int64)
    threshold = kept_threshold(probabilities, truth, np.array([True, True]), keep=0.95)
    assert threshold == pytest.approx(0.52)
    assert (best >= threshold).sum() == 96


def test_own_prompts_lost_to_the_general_domain_count_as_lost():
    probabilities = np.array([[0.4, 0.6]] * 10 + [[0.65, 0.35]] * 90)
    truth = np.zeros(100, dtype=np.int64)
    assert kept_threshold(probabilities, truth, np.array([True, False]), keep=0.95) == 0.0
    assert kept_threshold(probabilities, truth, np.array([True, False]), keep=0.9) == 0.65


def test_threshold_lets_few_strangers_pass_as_far_as_own_prompts_are_kept():
    own = np.stack([np.linspace(0.6, 1.0, 100), 1 - np.linspace(0.6, 1.0, 100)], axis=1)
    strange = np.stack([np.linspace(0.0, 0.8, 200), 1 - np.linspace(0.0, 0.8, 200)], axis=1)
    probabilities = np.concatenate([own, strange])
    truth = np.array([0] * 100 + [1] * 200)
    specialists, strangers = np.array([True, False]), np.arange(300) >= 100

    def threshold(keep, max_wrong=1.0):
        found = fit_threshold(
            probabilities, truth, specialists, strangers, 100, keep=keep, max_wrong=max_wrong
        )
        return found, (strange[:, 0] >= found).mean(), (own[:, 0] >= found).mean()

    assert threshold(0.5)[1] == MAX_STRAY
    assert threshold(0.95)[2] == 0.95
    assert threshold(0.95, max_wrong=0.01)[1] == 3 / 200


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 1.0])
    right = np.array([True, True, True, False, False, True])
    # Bins: |0.75 - 0.9| * 4, |0 - 0.5| * 1, |1 - 1| * 1, over 6 predictions.
    assert calibration_error(confidence, right) == pytest.approx((0.6 + 0.5) / 6)


def test_macro_f1_weighs_domains_alike():
    truth = np.array([0, 0, 0, 0, 1, 1])
    predicted = np.array([0, 0, 0, 0, 0, 1])
    assert macro_f1(predicted, truth) == pytest.approx((8 / 9 + 2 / 3) / 2)


def test_quality_refuses_nothing():
    with pytest.raises(ValueError, match="nothing to judge"):
        quality(np.array([], dtype=np.int64), np.array([]), np.array([], dtype=np.int64))


def test_threshold_keeps_wrong_experts_below_the_target():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 3)) * 2
    probabilities, truth = softmax(scores), draw(scores)
    specialists = np.array([True, True, False])
    free = wrong_expert(probabilities, truth, specialists, 0.0).mean()
    assert free > 0.1
    for target in (0.05, 0.02, 0.005):
        threshold = threshold_for(probabilities, truth, specialists, target)
        got = wrong_expert(probabilities, truth, specialists, threshold).mean()
        # The smallest such threshold: one more wrong prompt would be too many.
        assert target - 1 / 4000 < got <= target
    assert threshold_for(probabilities, truth, specialists, 1.0) == 0.0


def test_a_prompt_of_the_base_that_an_expert_answers_is_wrong():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    wrong = wrong_expert(probabilities, np.array([1, 1]), np.array([True, False]), 0.5)
    assert wrong.tolist() == [True, False]


def test_reliability_bins_confidence():
    points = reliability(np.array([0.95, 0.99, 0.5, 1.0]), np.array([True, False, True, True]))
    assert points[14] == pytest.approx((0.98, 2 / 3, 3))
    assert points[7] == (0.5, 1.0, 1)
    assert sum(point is None for point in points) == 13


def test_risk_is_of_the_prompts_that_an_expert_answers():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.2, 0.0, 0.8], [0.6, 0.4, 0.0]])
    points = {
        point[0]: point[1:]
        for point in risk_coverage(
            probabilities, np.array([0, 0, 2, -1]), np.array([True, True, False])
        )
    }
    assert points[0.0] == pytest.approx((0.75, 2 / 3))
    assert points[0.65] == pytest.approx((0.5, 0.5))
    assert points[0.8] == pytest.approx((0.25, 0.0))
    assert max(points) < 0.91
