"""Tokenizers are compared by what they read, whatever their files look like."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from deltamux.compression.streaming.same_tokenizer import (
    smaller_differences,
    tokenizer_difference,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, checkpoints):
    """A base's tokenizer with two merges."""
    root = tmp_path_factory.mktemp("served")
    checkpoints.save_tokenizer(root)
    path = root / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"th": 256, "the": 257}
    for token in content["added_tokens"]:
        token["id"] += 2
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]
    path.write_text(json.dumps(content))
    return root


def compared(served, tmp_path, change=None, settings=None):
    """The two tokenizers, the expert's from changed files."""
    own = shutil.copytree(served, tmp_path / "own")
    if change is not None:
        path = own / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, indent=7, sort_keys=True))
    if settings:
        path = own / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return AutoTokenizer.from_pretrained(served), AutoTokenizer.from_pretrained(own)


def add(content, token, place, **flags):
    common = {"special": True, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append(
        {"id": place, "content": token, "single_word": False} | common | flags
    )


def swap_added(content):
    first, second = content["added_tokens"][2:4]
    first["content"], second["content"] = second["content"], first["content"]


def swap_vocabulary(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def rename_added(content):
    content["added_tokens"][3]["content"] = "<|bot|>"


def set_flag(content):
    content["added_tokens"][0]["rstrip"] = True


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda c: add(c, "<|call|>", 262), "token '<|call|>' is 262 in the expert's tokenizer and is missing"),
        (lambda c: add(c, "<|plain|>", 262, special=False), "token '<|plain|>' is 262"),
        (swap_added, "(2 tokens differ)"),
        (swap_vocabulary, "token 'b' is 64 in the expert's tokenizer and is 65 in the base's"),
        (rename_added, "token '<|bot|>' is 261 in the expert's tokenizer and is missing"),
        (set_flag, "token '<|end|>' has rstrip True in the expert's tokenizer and False in the base's"),
        (lambda c: c["model"]["merges"].reverse(), "merge 0 is ('th', 'e') in the expert's tokenizer"),
        (lambda c: c["model"]["merges"].pop(), "merge 1 is None in the expert's tokenizer"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "the normalizer differs: 'The quick brown fox'"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "the normalizer differs: "),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "the pre_tokenizer differs: "),
        (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Whitespace"}, c["pre_tokenizer"]]}), "the pre_tokenizer differs: "),
    ],
    ids=["added", "added-plain", "swapped", "vocabulary", "renamed", "flag", "merges", "fewer-merges",
         "lowercase", "nfkc", "prefix-space", "whitespace"],
)  # fmt: skip
def test_a_tokenizer_that_reads_differently_is_told_by_what_differs(
    served, tmp_path, change, finding
):
    assert finding in (tokenizer_difference(*compared(served, tmp_path, change)) or "")


def merges_as_text(content):
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda c: None, None),
        (merges_as_text, None),
        (lambda c: c.update(truncation=None, padding=None), None),
        # Another spelling of the same step.
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": []}), None),
        (None, {"model_max_length": 17, "padding_side": "left", "clean_up_tokenization_spaces": True}),
        (None, {"eos_token": "<|user|>"}),
    ],
    ids=["indented", "merges-as-text", "truncation", "empty-normalizer", "settings", "end"],
)  # fmt: skip
def test_the_same_tokenizer_in_other_words_is_the_same(served, tmp_path, change, settings):
    pair = compared(served, tmp_path, change, settings)
    assert tokenizer_difference(*pair) is None
    assert smaller_differences(*pair) == []


def test_a_token_for_padding_is_none_that_is_read(served, tmp_path):
    pair = compared(served, tmp_path, lambda c: add(c, "[PAD]", 262), {"pad_token": "[PAD]"})
    assert tokenizer_difference(*pair) is None
    assert smaller_differences(*pair) == [
        "token '[PAD]' of the expert is for padding, and never read"
    ]


def test_tokens_that_only_the_base_has_are_told(served, tmp_path):
    own, base = compared(served, tmp_path, lambda c: add(c, "<|call|>", 262))
    assert tokenizer_difference(base, own) is None
    (line,) = smaller_differences(base, own)
    assert line.startswith("token '<|call|>' is the base's alone (1 are)")
