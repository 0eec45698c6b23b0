"""What users can cause is one line; what we cause keeps its traceback."""

import json

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.errors import naming
from deltamux.compression.saving import save_tensors, save_text
from deltamux.serve.cli import app


def refusal(*arguments):
    """What the command line prints behind `error:`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, ValueError | OSError), result.exception
    message = str(result.exception)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("error", "finding"),
    [
        (KeyError("weight_map"), "lacks 'weight_map'"),
        (TypeError("no\nlist"), "cannot be used: no list"),
        (SafetensorError("cut"), "cannot be used: cut"),
        (OSError(28, "No space left on device"), "cannot be used: No space left on device"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "x"), "is no UTF-8 text: byte 0xe9 at 0"),
        (json.JSONDecodeError("Expecting value", "", 0), "is no JSON: Expecting value, line 1"),
    ],
)
def test_an_error_is_named_with_what_was_read(tmp_path, error, finding):
    with pytest.raises(ValueError, match="mend it") as caught, naming(tmp_path / "a", "mend it"):
        raise error
    assert str(caught.value).startswith(f"{str(tmp_path / 'a')!r} {finding}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("ours"), AssertionError(), ZeroDivisionError()])
def test_faults_of_ours_stay_what_they_are(error):
    with pytest.raises(type(error)), naming("a file"):
        raise error


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pair(make_pair, tmp_path, checkpoints):
    import shutil

    return tuple(
        shutil.copytree(root, tmp_path / name)
        for root, name in zip(make_pair(), ("base", "expert"), strict=True)
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{{ messages[0].content + 1 }}", "cannot be used"),
        ("{{ nothing.at_all }}", "cannot be used"),
    ],
)
def test_a_template_s_words_are_told_with_the_row(pair, tmp_path, template, words):
    rows = write_rows(tmp_path / "rows.jsonl", *[{"prompt": "a", "response": "b"}] * 8)
    (pair[1] / "chat_template.jinja").write_text(template)
    message = refusal("compress", *pair, "-o", tmp_path / "a", "--calibration", rows)
    assert message.startswith(f"{rows}:")
    assert words in message


def test_a_template_that_cannot_be_parsed_is_told_with_its_file_and_line(pair, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", *[{"prompt": "a", "response": "b"}] * 8)
    path = pair[1] / "chat_template.jinja"
    path.write_text("\n{% for m in %}")
    message = refusal("compress", *pair, "-o", tmp_path / "a", "--calibration", rows)
    assert message.startswith(f"{str(path)!r}: chat template: line 2: ")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("[]", "cannot be used"),
        ("{}", "lacks 'weight_map'"),
        ("{", "is no JSON"),
        ('{"weight_map": 3}', "cannot be used"),
    ],
)
def test_a_damaged_index_is_named(pair, content, finding):
    path = pair[1] / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=finding) as caught:
        open_checkpoint(pair[1])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1,}'])
def test_a_damaged_configuration_is_named(pair, content):
    (pair[1] / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json' is no "):
        open_checkpoint(pair[1])


def test_a_damaged_tokenizer_is_named(pair, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", *[{"prompt": "a", "response": "b"}] * 8)
    (pair[0] / "tokenizer.json").write_text("{")
    message = refusal("compress", *pair, "-o", tmp_path / "a", "--calibration", rows)
    assert f"the tokenizer in {str(pair[0])!r}" in message


def test_a_full_disk_is_told_with_the_path_and_the_bytes_needed(tmp_path, full_disk):
    path = tmp_path / "file"
    needed = r"file' cannot be used: .*: 4,000 bytes are needed there"
    with pytest.raises(ValueError, match=needed), full_disk(1000):
        save_tensors({"a": torch.zeros(1000)}, path, {})
    with pytest.raises(ValueError, match=needed), full_disk(1000):
        save_text("x" * 4000, path)


def test_a_full_disk_is_told_of_files_that_are_copied(pair, tmp_path, full_disk):
    (tmp_path / "target").mkdir()
    needed = r"tokenizer\.json' cannot be used: .* bytes are needed"
    with pytest.raises(ValueError, match=needed), full_disk(1000):
        open_checkpoint(pair[0]).copy_side_files(tmp_path / "target")


def test_a_folder_that_cannot_be_made_is_told(pair):
    message = refusal("compress", *pair, "-o", "/proc/none/artifact")
    assert message.startswith("'/proc/none' cannot be used: ")
