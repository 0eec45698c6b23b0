from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamux.router.decide.messages import EDGE_CHARS, EDGE_TURNS, user_turns

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("role"), inner),
    max_leaves=20,
)


def test_a_prompt_is_one_turn():
    assert user_turns("hello") == ["hello"]


def test_only_user_messages_count():
    messages = [
        {"role": "system", "content": "you are a poet"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "second"},
    ]
    assert user_turns(messages) == ["first", "second"]


def test_text_parts_are_joined_and_other_parts_skipped():
    content = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_text", "text": "this?"},
        {"type": "tool_result", "content": "no"},
    ]
    assert user_turns([{"role": "user", "content": content}]) == ["what is\nthis?"]


def test_messages_may_be_objects():
    message = SimpleNamespace(role="user", content=[SimpleNamespace(type="text", text="hi")])
    assert user_turns([message]) == ["hi"]


def test_a_one_shot_iterator_is_left_unread():
    parts = iter([{"type": "text", "text": "hi"}])
    assert user_turns([{"role": "user", "content": parts}]) == []
    assert next(parts)["text"] == "hi"


@pytest.mark.parametrize("empty", [None, "", "  \n", [], 7, [1, 2], [{"role": "user"}], {}])
def test_no_text_is_no_turn(empty):
    assert user_turns(empty) == []


def test_a_long_turn_keeps_both_ends():
    (turn,) = user_turns("a" * 10_000 + "b" * 10_000)
    assert turn == "a" * EDGE_CHARS + "b" * EDGE_CHARS


def test_a_long_conversation_keeps_both_ends():
    turns = user_turns([{"role": "user", "content": str(i)} for i in range(1000)])
    assert len(turns) == 2 * EDGE_TURNS
    assert (turns[0], turns[-1]) == ("0", "999")


def test_lone_surrogates_become_encodable():
    (turn,) = user_turns("bad \ud800 text")
    assert turn == "bad ? text"


@UNHURRIED
@given(JSON | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON})))
def test_odd_input_gives_turns_that_can_be_encoded(value):
    for turn in user_turns(value):
        assert turn.strip()
        turn.encode("utf-8")
