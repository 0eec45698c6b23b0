import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamux.router.decide.artifact import save_artifact
from deltamux.router.decide.config import HeldOut, RouterConfig, Training
from deltamux.router.decide.decision import REASONS
from deltamux.router.decide.features import pair_buckets
from deltamux.router.decide.router import Router
from deltamux.router.decide.tables import Tables, softmax

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Token 1 speaks for math, 2 for sql, 3 for general; the others are silent.
LABELS = ["general", "math", "sql"]
CONFIG = RouterConfig(
    labels=LABELS,
    experts={"general": None, "math": "math-v2", "sql": "sql"},
    threshold=0.8,
    temperature=0.5,
    vocab_size=10,
    buckets=16,
    prefix_tokens=4,
    suffix_tokens=4,
    tokenizer_sha256="0" * 64,
    training=Training(prompts={}, mix={}, added=0, embedding=False, seed=0, keep=0.95),
    heldout=HeldOut(accuracy=1, macro_f1=1, ece=0, kept=1, n=1),
)


def make_tables():
    tokens = np.zeros((10, 3), dtype=np.float32)
    tokens[[3, 1, 2], [0, 1, 2]] = 4.0
    return Tables(tokens, np.zeros((16, 3), np.float32), np.array([0.0, 0.1, 0.0], np.float32))


ROUTER = Router(CONFIG, make_tables())


def test_a_specialist_prompt_goes_to_the_expert_of_its_domain():
    decision = ROUTER.decide_ids([[1, 5]])
    assert (decision.expert, decision.domain, decision.reason) == ("math-v2", "math", "router")
    assert decision.confidence == decision.probabilities["math"] > 0.99


def test_a_general_prompt_is_left_to_the_base():
    decision = ROUTER.decide_ids([[3]])
    assert (decision.expert, decision.domain, decision.reason) == (None, "general", "abstain")
    assert decision.confidence > 0.99


def test_an_unsure_specialist_is_left_to_the_base():
    decision = ROUTER.decide_ids([[1, 2]])
    assert (decision.expert, decision.domain, decision.reason) == (None, "math", "abstain")


def test_json_has_the_four_public_fields():
    assert ROUTER.decide_ids([[3]]).to_json() == {
        "expert": None,
        "domain": "general",
        "confidence": pytest.approx(0.9993, abs=1e-3),
        "reason": "abstain",
    }


def test_a_follow_up_stays_with_the_conversation():
    assert ROUTER.decide_ids([[1], [5, 6]]).expert == "math-v2"


def test_a_confident_last_turn_changes_the_subject():
    assert ROUTER.decide_ids([[1], [1, 4], [2]]).expert == "sql"


@pytest.mark.parametrize("turns", [[], [[]], [[], []], [[-1, 10, 999]], [[2**80]]])
def test_without_evidence_the_router_abstains(turns):
    router = Router(CONFIG.model_copy(update={"threshold": 0.0}), make_tables())
    decision = router.decide_ids(turns)
    assert (decision.expert, decision.reason) == (None, "abstain")


def test_a_last_turn_without_known_tokens_does_not_override():
    tables = make_tables()
    tables.bias[2] = 4.0
    assert Router(CONFIG, tables).decide_ids([[1, 1], [99]]).confidence < 0.95


def test_probabilities_follow_the_formula_of_the_tables():
    rng = np.random.default_rng(0)
    shapes = [(10, 3), (16, 3), (3,), (4, 3)]
    tokens, pairs, bias, meaning = (rng.normal(size=s).astype(np.float32) for s in shapes)
    got = Router(CONFIG, Tables(tokens, pairs, bias)).probabilities([4, 4, 5])
    # Two distinct tokens and two distinct pairs, (4, 4) and (4, 5).
    first, second = pair_buckets(np.array([4, 4, 5]), 16)
    assert first != second
    scores = bias + (tokens[4] + tokens[5] + pairs[first] + pairs[second]) / 2**0.5
    np.testing.assert_allclose(got, softmax(scores.astype(np.float64), 0.5), atol=1e-6)
    vector = rng.normal(size=4).astype(np.float32)
    with_vector = Tables(tokens, pairs, bias, meaning).scores(np.array([4, 4, 5]), vector)
    np.testing.assert_allclose(with_vector, scores + vector @ meaning, atol=1e-5)


@UNHURRIED
@given(st.lists(st.lists(st.integers() | st.integers(-2, 12), max_size=12), max_size=6))
def test_any_integers_give_a_well_formed_decision(turns):
    decision = ROUTER.decide_ids(turns)
    assert decision.reason in REASONS
    assert decision.domain in LABELS
    assert (decision.expert is None) == (decision.reason == "abstain")
    assert sum(decision.probabilities.values()) == pytest.approx(1.0)
    assert 0 <= decision.confidence <= 1
    if decision.reason == "abstain":
        assert decision.confidence >= 1 / 3


@UNHURRIED
@given(st.lists(st.text("123", max_size=6), max_size=8))
def test_texts_decide_like_the_ids_of_all_their_turns(texts):
    def encode(text):
        return [int(character) for character in text]

    by_text = ROUTER.decide(texts, encode)
    assert by_text == ROUTER.decide_ids([encode(text) for text in texts])


def test_the_middle_of_a_long_conversation_is_not_tokenized():
    seen = []
    ROUTER.decide([f"{i} turn" for i in range(100)], lambda text: seen.append(text) or [1, 2])
    # Four tokens at each end, two a turn.
    assert sorted(seen) == sorted(["0 turn", "1 turn", "98 turn", "99 turn"])


def test_a_hundred_thousand_ids_take_bounded_time():
    # This thread's own time, so that what else runs on the machine does not count: below a millisecond.
    start = time.thread_time()
    ROUTER.decide_ids([list(range(100_000)), [1] * 100_000])
    assert time.thread_time() - start < 0.5


def test_deciding_imports_no_training_library(tmp_path):
    save_artifact(tmp_path / "router", make_tables(), CONFIG, b"{}")
    program = """
import sys
from deltamux.router.decide.messages import user_turns
from deltamux.router.decide.router import Router
router = Router.load(sys.argv[1])
print(router.decide(user_turns("hello"), lambda text: [1]).expert)
print(sorted({"torch", "sklearn", "scipy", "transformers", "tokenizers"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "router")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["math-v2", "[]"]
