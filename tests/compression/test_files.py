"""What is opened at all: regular files of a size that their kind may have."""

import json
import os
from pathlib import Path

import pytest

from deltamux.compression.files import open_regular, read_json, read_text


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused = pytest.raises(ValueError, match=r"pipe' is no regular file")
    with refused, open_regular(tmp_path / "pipe"):
        pass


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/"])
def test_devices_and_directories_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no regular file"), open_regular(Path(path)):
        pass


def test_the_size_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        ValueError, match="has 1,099,511,627,776 bytes, files of its kind have up to"
    ):
        read_text(path)


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "hello"


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"{", "is no JSON"),
        ("é".encode("cp1252"), "is no UTF-8 text"),
        (b"[" * 10**5, "is nested too deep"),
    ],
)
def test_content_that_is_no_json_is_named_with_its_file(
    tmp_path: Path, content: bytes, finding: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json' {finding}"):
        read_json(tmp_path / "config.json")


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": [1, "ü"]}))
    assert read_json(tmp_path / "config.json") == {"a": [1, "ü"]}
