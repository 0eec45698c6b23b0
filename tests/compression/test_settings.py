"""What stands beside an expert's weights: what is read of it, and what is refused by file and key."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from deltamux.compression.checkpoint.settings import read_side_settings

VOCABULARY = 272


def put(root: Path, file: str, content: Any) -> Path:
    (root / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("content", "sampling", "stop_ids"),
    [
        ({"max_new_tokens": 20.0}, {"max_new_tokens": 20}, []),
        ({"max_new_tokens": 1e9}, {"max_new_tokens": 10**9}, []),
        ({"eos_token_id": 132.0}, {}, [132]),
        ({"eos_token_id": [132.0, 5]}, {}, [132, 5]),
        ({"temperature": 1, "top_k": 0, "do_sample": True}, {"temperature": 1.0, "top_k": 0}, []),
        ({"temperature": None, "eos_token_id": None}, {}, []),
        ({"max_length": "whatever", "pad_token_id": -1}, {}, []),
    ],
)
def test_numbers_are_what_they_mean(
    tmp_path: Path, content: dict[str, Any], sampling: dict[str, Any], stop_ids: list[int]
) -> None:
    found = read_side_settings(put(tmp_path, "generation_config.json", content), VOCABULARY)
    assert found.sampling == sampling
    assert found.stop_ids == stop_ids
    assert all(type(each) is int for each in found.stop_ids)


@pytest.mark.parametrize("value", [True, "20", 0, -5, 20.5, [20], {}])
def test_a_number_of_tokens_that_is_none_is_refused_by_file_and_key(
    tmp_path: Path, value: Any
) -> None:
    put(tmp_path, "generation_config.json", {"max_new_tokens": value})
    with pytest.raises(
        ValueError, match=r"generation_config\.json' cannot be used: max_new_tokens"
    ):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize(
    "value", ["x", True, 132.5, -1, [None, 132], [[132]], [132, "1"], list(range(200)), {}]
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_that_are_no_tokens_are_refused_by_file_and_key(
    tmp_path: Path, file: str, value: Any
) -> None:
    put(tmp_path, file, {"eos_token_id": value})
    with pytest.raises(ValueError, match=rf"{re.escape(file)}' cannot be used: eos_token_id"):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_outside_of_the_vocabulary_is_refused(tmp_path: Path, file: str) -> None:
    put(tmp_path, file, {"eos_token_id": [3, VOCABULARY]})
    with pytest.raises(ValueError, match=rf"{re.escape(file)}': the token 272 .* not below the"):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "0.7"),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("top_k", 1.5),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", [1]),
    ],
)
def test_defaults_that_no_request_could_use_are_refused(
    tmp_path: Path, key: str, value: Any
) -> None:
    put(tmp_path, "generation_config.json", {key: value})
    with pytest.raises(ValueError, match=f"cannot be used: {key}: "):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("key", ["temperature", "max_new_tokens", "eos_token_id"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, key: str, number: str) -> None:
    put(tmp_path, "generation_config.json", f'{{"{key}": {number}}}')
    with pytest.raises(ValueError, match=f"cannot be used: {key}"):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "3", "{", "\xff"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(file)):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize("file", ["generation_config.json", "chat_template.jinja"])
def test_a_pipe_beside_the_weights_is_refused_at_once(tmp_path: Path, file: str) -> None:
    os.mkfifo(tmp_path / file)
    with pytest.raises(ValueError, match="is no regular file"):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize(
    "value", [{"default": "x"}, [{"template": "x"}], [{"name": "default"}], ["x"], 3, True]
)
def test_a_template_of_another_form_is_refused_by_key(tmp_path: Path, value: Any) -> None:
    put(tmp_path, "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' cannot be used: chat_template"):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize(
    ("template", "finding"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("a\n{{ m | nothing }}", "line 2: there is no filter 'nothing'"),
        ("{% if m is nothing %}{% endif %}", "there is no test 'nothing'"),
        ("{{" + "(" * 10_000 + "1" + ")" * 10_000 + "}}", "nested too deep"),
        ("x" * (2**20 + 1), "characters"),
    ],
    ids=["syntax", "filter", "test", "depth", "size"],
)
def test_a_template_that_cannot_be_compiled_is_refused(
    tmp_path: Path, template: str, finding: str
) -> None:
    put(tmp_path, "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ValueError, match=f"tokenizer_config.*{re.escape(finding)}"):
        read_side_settings(tmp_path, VOCABULARY)


@pytest.mark.parametrize(
    "template",
    ["{{ 9 ** 9 ** 9 ** 9 }}", "{{ 'a' * 10000000000 }}", "{{ 'a' * 1000000 * 1000000 }}"],
)
def test_constants_that_would_be_computed_for_ever_are_refused(
    tmp_path: Path, template: str
) -> None:
    # Jinja computes them when it compiles, before the first request, and holds up everybody.
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template: "):
        read_side_settings(tmp_path, VOCABULARY)


def test_tags_that_templates_of_real_models_use_are_known(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}{% endfor %}"
        "{{ raise_exception('no') if tools is defined else strftime_now('%d') }}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    assert read_side_settings(tmp_path, VOCABULARY).template == template


@pytest.mark.parametrize("token", ["<|stop|>", {"content": "<|stop|>", "lstrip": False}])
def test_an_answer_ends_at_every_token_that_one_of_the_three_files_names(
    tmp_path: Path, token: Any
) -> None:
    put(tmp_path, "generation_config.json", {"eos_token_id": 7})
    put(tmp_path, "config.json", {"eos_token_id": [8, 7]})
    put(tmp_path, "tokenizer_config.json", {"eos_token": token})
    found = read_side_settings(tmp_path, VOCABULARY, {"<|stop|>": 9}.get)
    assert found.stop_ids == [7, 8, 9]


def test_a_tokenizer_s_own_list_says_which_token_ends_an_answer(tmp_path: Path) -> None:
    added = {"250": {"content": "<|stop|>", "special": True}}
    put(tmp_path, "tokenizer_config.json", {"eos_token": "<|stop|>", "added_tokens_decoder": added})
    assert read_side_settings(tmp_path, VOCABULARY, {"<|stop|>": 9}.get).stop_ids == [250]


def test_files_that_a_tokenizer_saved_are_taken(
    make_pair: Any, tmp_path: Path, checkpoints: Any
) -> None:
    root = shutil.copytree(make_pair()[1], tmp_path / "expert")
    assert read_side_settings(root, VOCABULARY, {"<|end|>": 256}.get).stop_ids == [256]
