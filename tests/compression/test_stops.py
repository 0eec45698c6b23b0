"""An expert's turn ends at what any of its files names."""

import json
import shutil

import pytest

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.streaming.stops import stop_ids

FILES = {
    "generation": ("generation_config.json", "eos_token_id"),
    "config": ("config.json", "eos_token_id"),
    "tokenizer": ("tokenizer_config.json", "eos_token"),
}


@pytest.fixture
def root(make_pair, tmp_path):
    """A checkpoint that names no end of a turn anywhere; `<|end|>` is 256, `<|user|>` 258."""
    copied = shutil.copytree(make_pair()[1], tmp_path / "expert")
    for name, key in FILES.values():
        edit(copied / name, key)
    return copied


def edit(path, key, *value):
    content = json.loads(path.read_text()) if path.exists() else {}
    content.pop(key, None)
    path.write_text(json.dumps(content | ({key: value[0]} if value else {})))


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ({}, []),
        ({"generation": 256}, [256]),
        ({"generation": [256, 5]}, [256, 5]),
        ({"config": 5}, [5]),
        ({"config": [256, 5]}, [256, 5]),
        ({"config": 5, "generation": 256}, [256, 5]),
        ({"config": [256, 5], "generation": 256}, [256, 5]),
        ({"tokenizer": "<|user|>"}, [258]),
        ({"tokenizer": {"content": "<|user|>"}, "generation": 256}, [256, 258]),
        ({"tokenizer": "a"}, [64]),
        ({"tokenizer": "<|nowhere|>", "config": 5}, [5]),
        ({"tokenizer": "<|user|>", "generation": [256], "config": 5}, [256, 5, 258]),
    ],
    ids=str,
)
def test_the_ends_of_all_files_are_taken_together(root, named, wanted):
    for which, value in named.items():
        edit(root / FILES[which][0], FILES[which][1], value)
    assert stop_ids(root) == wanted


def test_a_missing_generation_config_leaves_the_others(root):
    (root / "generation_config.json").unlink()
    edit(root / "config.json", "eos_token_id", 7)
    assert stop_ids(root) == [7]


def test_the_end_of_an_inner_configuration_counts(root):
    edit(root / "config.json", "text_config", {"eos_token_id": [7, 8]})
    assert stop_ids(root) == [7, 8]


@pytest.mark.parametrize("value", ["x", 1.5, True, [None], [[1]], -1, {"a": 1}], ids=str)
def test_what_is_no_token_is_refused_with_its_file(root, value):
    edit(root / "generation_config.json", "eos_token_id", value)
    with pytest.raises(ValueError, match=r"generation_config\.json' cannot be used: eos_token_id"):
        stop_ids(root)


@pytest.mark.parametrize("content", ["[]", "{", "null"])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(root, name, content):
    (root / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}' is no JSON"):
        stop_ids(root)


def test_an_artifact_names_all_ends_where_servers_look(make_pair, root, compress_pair, tmp_path):
    edit(root / "config.json", "eos_token_id", [256, 7])
    edit(root / "tokenizer_config.json", "eos_token", "<|user|>")
    edit(root / "generation_config.json", "temperature", 0.5)
    artifact = Artifact(compress_pair(make_pair()[0], root, tmp_path / "artifact"))
    written = json.loads((artifact.root / "generation_config.json").read_text())
    assert written["eos_token_id"] == [256, 7, 258]
    assert written["temperature"] == 0.5
