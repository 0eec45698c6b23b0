"""Text is read as the server will read it, and where the expert would read otherwise, that is said."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.streaming.rows import Conversation
from deltamux.compression.streaming.served import (
    assumptions,
    check_tokenizer,
    own_template,
    served_reading,
)
from deltamux.serve.cli import app

ROWS = [Conversation([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}])]
OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def pair(make_pair, tmp_path):
    """(base, expert) that a test may change."""
    return tuple(
        shutil.copytree(root, tmp_path / name)
        for root, name in zip(make_pair(), ("base", "expert"), strict=True)
    )


def opened(pair):
    return tuple(open_checkpoint(root) for root in pair)


def read(pair):
    from transformers import AutoTokenizer

    (sample,) = served_reading(*opened(pair)).samples(ROWS, 100)
    return AutoTokenizer.from_pretrained(pair[0]).decode(sample.ids)


def add_token(root, token):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(root)


def test_the_expert_s_template_is_read_with_the_base_s_tokenizer(pair):
    (pair[1] / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    assert read(pair) == "[user]ab<|end|>[assistant]cd<|end|>"
    assert served_reading(*opened(pair)).tokenizer == pair[0]


def test_an_expert_without_a_template_is_read_with_the_base_s(pair):
    before = read(pair)
    (pair[1] / "chat_template.jinja").unlink()
    assert read(pair) == before
    (line,) = assumptions(*opened(pair))
    assert "has no chat template: it is served with the base's" in line


def test_equal_tokenizers_and_templates_leave_nothing_to_assume(pair):
    assert assumptions(*opened(pair)) == []
    assert check_tokenizer(*opened(pair)) == []


def test_without_a_tokenizer_of_the_base_the_expert_s_is_taken(pair):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair[0] / name).unlink()
    assert served_reading(*opened(pair)).tokenizer == pair[1]


def test_without_any_template_messages_are_lines_and_that_is_told(pair):
    for root in pair:
        (root / "chat_template.jinja").unlink()
    assert read(pair) == "ab\ncd"
    assert assumptions(*opened(pair)) == [
        "neither has a chat template: messages are read as lines of text"
    ]


def test_compress_refuses_another_tokenizer_by_token_and_leaves_nothing(pair, text_file, tmp_path):
    add_token(pair[1], "<|call|>")
    output = tmp_path / "artifact"
    arguments = ["compress", *pair, "-o", output, "--calibration", text_file, "--bits", 2]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith("token '<|call|>' is 260 in the expert's tokenizer")
    assert "copy its tokenizer files into" in str(result.exception)
    assert not output.exists()


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"chat_template": [{"template": "x"}]}', '{"chat_template": {"a": 1}}']
)
def test_damaged_tokenizer_settings_are_named_by_their_file(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json' (is no JSON|cannot be used: chat_template)"
    ):
        own_template(tmp_path)


def test_of_several_templates_the_default_one_counts(tmp_path):
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert own_template(tmp_path) == "d"


def with_head(root, change):
    """A tied checkpoint that has an lm_head in its file all the same."""
    path = root / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = change(weights["model.embed_tokens.weight"].clone())
    save_file(weights, path)


@pytest.fixture
def tied_pair(make_pair, tmp_path):
    return tuple(
        shutil.copytree(root, tmp_path / name)
        for root, name in zip(make_pair(tied=True), ("base", "expert"), strict=True)
    )


@pytest.mark.parametrize("side", [0, 1])
def test_a_tied_head_that_is_another_matrix_is_refused(tied_pair, side):
    with_head(tied_pair[side], lambda head: head + 1)
    with pytest.raises(ValueError, match="though its configuration ties the two: save it with"):
        compare(*opened(tied_pair))


def test_a_tied_head_that_is_written_twice_is_the_embedding(tied_pair):
    with_head(tied_pair[1], lambda head: head)
    assert compare(*opened(tied_pair)).expert.tied


@pytest.mark.parametrize("equal", [True, False])
def test_an_untied_expert_of_a_tied_base_needs_equal_matrices(tied_pair, equal):
    with_head(tied_pair[1], lambda head: head if equal else head + 1)
    path = tied_pair[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    if equal:
        difference = compare(*opened(tied_pair))
        assert difference.expert.tied
        assert "lm_head.weight" not in [spec.name for spec in difference.specs]
    else:
        with pytest.raises(ValueError, match=r"is tied to .* save the base untied"):
            compare(*opened(tied_pair))


def test_turns_end_at_the_expert_s_own_stop_tokens(pair):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    path = pair[1] / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": tokenizer.convert_tokens_to_ids(["d"])}))
    (pair[1] / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if not add_generation_prompt %}.tail{% endif %}"
    )
    assert read(pair) == "abcd"
