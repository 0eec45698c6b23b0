"""Frames found in labelled prompts, what is made of them, and what deltamux adds by itself."""

from deltamux.router.fit.augment import GENERATED_WEIGHT, VIEWS_LIKE, augment
from deltamux.router.fit.background import everyday_prompts, followups, subject_prompts
from deltamux.router.fit.data import Prompt
from deltamux.router.fit.frames import find_frames, make_views

CODE = [
    Prompt((f"Write a function to {verb} the {thing} list.\nassert f({n}) == {n}",), "code")
    for n, verb in enumerate(["sort", "reverse", "count", "merge"])
    for thing in ["longest nested", "first empty"]
]
CHAT = [Prompt((f"{word} is a nice word to talk about",), "chat") for word in "abcdefgh"]


def test_frames_are_the_first_words_that_lines_share():
    frames = find_frames(
        [["Write a function to sort it now"]] * 3 + [["Something else entirely here"]]
    )
    assert "Write a function" in frames
    assert "Write a function to sort" not in frames  # three words must be left
    assert not any(frame.startswith("Something") for frame in frames)


def test_each_line_also_stands_alone_and_without_its_frame():
    views = make_views(CODE + CHAT, seed=0)
    own = {view.text for view in views if view.origin == 0 and view.weight == 1.0}
    assert "Write a function to sort the longest nested list." in own
    assert "assert f(0) == 0" in own
    rest = {text for text in own if "Write" not in text and "assert" not in text}
    assert any(text.endswith("the longest nested list.") for text in rest)


def test_some_prompts_get_the_frame_of_another_domain_and_keep_their_label():
    views = make_views((CODE + CHAT) * 10, seed=0)
    foreign = [view for view in views if view.weight < 1.0]
    assert foreign
    framed = [view for view in foreign if view.text.endswith("is a nice word to talk about")]
    assert framed
    for view in framed:
        assert view.text.startswith(("Write a", "assert"))
        assert ((CODE + CHAT) * 10)[view.origin].domain == "chat"


def test_views_are_the_same_for_a_seed():
    assert make_views(CODE, seed=3) == make_views(CODE, seed=3)


def test_generated_prompts_are_many_different_and_none_has_a_gap():
    texts = everyday_prompts()
    assert len(texts) == len(set(texts)) > 300
    assert not any("{" in text or "}" in text for text in texts)
    assert texts == everyday_prompts()


def test_generated_prompts_go_to_the_base_in_number_like_a_domain():
    examples = augment(CODE + CHAT, {"chat": None, "code": "code"}, {})
    generated = [example for example in examples if example.generated]
    assert {example.prompt.domain for example in generated} == {"chat"}
    assert {example.weight for example in generated} == {GENERATED_WEIGHT}
    fields = subject_prompts(0)
    pools = set(followups()) | set(everyday_prompts(0)) | set(fields)
    assert {example.prompt.turns[0] for example in generated} <= pools
    # A quarter of eight of each of three kinds, as each domain has eight prompts.
    assert len(generated) == 6
    assert all(e.field == fields.get(e.prompt.turns[0], "") for e in generated)
    origins = [example.origin for example in generated]
    assert len(set(origins)) == len(origins)
    assert min(origins) == len(CODE + CHAT)


def test_without_a_domain_of_the_base_nothing_is_generated():
    examples = augment(CODE + CHAT, {"chat": "chat", "code": "code"}, {})
    assert not any(example.generated for example in examples)


def test_subjects_come_from_many_fields_and_fill_every_gap():
    fields = subject_prompts()
    assert len(set(fields.values())) > 15
    assert not any("{" in text or "}" in text for text in fields)
    assert subject_prompts(1) != fields == subject_prompts(0)


def test_views_hardly_count_for_the_meaning_and_foreign_ones_not_at_all():
    examples = augment((CODE + CHAT) * 10, {"chat": None, "code": "code"}, {})
    labelled = len(CODE + CHAT) * 10
    views = [e for e in examples[labelled:] if not e.generated]
    assert {(e.weight, e.meaning) for e in views} == {(1.0, VIEWS_LIKE / 80), (0.25, 0.0)}
    assert {e.meaning for e in examples[:labelled]} == {1.0}


def test_a_description_is_an_example_of_its_domain():
    examples = augment(CODE, {"code": "code"}, {"code": "Write programs"})
    (described,) = [example for example in examples if example.generated]
    assert described.prompt == Prompt(("Write programs",), "code")
    assert described.weight > 1
