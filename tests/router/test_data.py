import json

import pytest

from deltamux.router.fit.background import followups
from deltamux.router.fit.data import Prompt, fingerprints, read_dataset


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(dataset):
    return [(prompt.turns, prompt.domain) for prompt in dataset.prompts]


def test_a_file_names_the_domain_in_every_row(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    file = write(
        tmp_path / "all.jsonl",
        {"prompt": "1+1", "domain": "math"},
        {"messages": messages, "domain": "chat"},
    )
    assert pairs(read_dataset(file)) == [(("1+1",), "math"), (("a", "b"), "chat")]


def test_a_folder_of_files_names_domains_by_file_unless_a_row_does(tmp_path):
    write(tmp_path / "math.jsonl", {"prompt": "1+1"}, {"prompt": "hi", "domain": "chat"})
    write(tmp_path / "sql.jsonl", {"prompt": "join"})
    expected = [(("1+1",), "math"), (("hi",), "chat"), (("join",), "sql")]
    assert pairs(read_dataset(tmp_path)) == expected


def test_a_folder_of_folders_gives_the_first_split_that_exists(tmp_path):
    write(tmp_path / "math" / "train.jsonl", {"prompt": "train"})
    write(tmp_path / "math" / "test.jsonl", {"prompt": "test"})
    write(tmp_path / "sql" / "train.jsonl", {"prompt": "join"})
    (tmp_path / "images").mkdir()
    assert pairs(read_dataset(tmp_path))[0] == (("train",), "math")
    evaluated = read_dataset(tmp_path, splits=("test", "train"))
    assert pairs(evaluated) == [(("test",), "math"), (("join",), "sql")]
    assert [file.name for file in evaluated.files] == ["test.jsonl", "train.jsonl"]


def test_duplicates_are_dropped_and_conflicts_reported(tmp_path):
    write(tmp_path / "math.jsonl", {"prompt": "same"}, {"prompt": "same"}, {"prompt": "both"})
    write(tmp_path / "sql.jsonl", {"prompt": "both"})
    dataset = read_dataset(tmp_path)
    assert dataset.num_duplicates == 1
    assert dataset.conflicts == [("both",)]
    assert len(dataset.prompts) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Expecting"),
        (b"[1]", "must be a JSON object"),
        (b'{"domain": "x"}', "needs 'prompt'"),
        (b'{"prompt": " ", "domain": "x"}', "no text"),
        (b'{"prompt": "hi"}', "'domain' must be"),
        (b'{"prompt": "hi", "domain": 3}', "'domain' must be"),
        (b'{"prompt": "\xff", "domain": "x"}', "decode"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"prompt": "ok", "domain": "x"}\n\n' + line)
    with pytest.raises(ValueError, match=f"data.jsonl, line 3: .*{message}"):
        read_dataset(file)


def test_an_empty_folder_is_refused_with_the_layouts(tmp_path):
    with pytest.raises(ValueError, match=r"one \.jsonl file or one sub-folder"):
        read_dataset(tmp_path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_dataset(tmp_path / "nowhere")


def test_fingerprints_tell_words_apart_but_not_case_and_space():
    prompts = [
        Prompt((text,), "math") for text in ("One  and two", "one and\nTWO", "one and three")
    ]
    first, second, third = fingerprints(prompts)
    assert first == second != third


def test_follow_ups_are_a_few_dozen_phrases_without_repetition():
    assert len(followups()) == len(set(followups())) > 48
    assert {"why", "Why?", "looks good, thanks"} <= set(followups())


@pytest.mark.parametrize("splits", [("train",), ("test", "train")])
@pytest.mark.parametrize("prefix", ["", "math-", "math.", "math_"])
def test_names_of_splits_are_no_domains(tmp_path, prefix, splits):
    for split in ("train", "test", "validation", "dev"):
        write(tmp_path / f"{prefix}{split}.jsonl", {"prompt": split, "domain": "math"})
    found = read_dataset(tmp_path, splits=splits)
    assert pairs(found) == [((splits[0],), "math")]


def test_a_split_names_the_domain_in_front_of_it(tmp_path):
    write(tmp_path / "math-train.jsonl", {"prompt": "1+1"})
    write(tmp_path / "sql-test.jsonl", {"prompt": "join"})
    write(tmp_path / "latest.jsonl", {"prompt": "news"})
    assert pairs(read_dataset(tmp_path)) == [(("news",), "latest"), (("1+1",), "math")]


def test_files_that_begin_with_a_dot_are_left_alone(tmp_path):
    write(tmp_path / "math.jsonl", {"prompt": "1+1"})
    (tmp_path / "._math.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "train.jsonl", {"prompt": "no"})
    assert pairs(read_dataset(tmp_path)) == [(("1+1",), "math")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_named_as_such(tmp_path, encoding):
    text = json.dumps({"prompt": "1+1", "domain": "math"})
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "all.jsonl").write_bytes((mark + text).encode(encoding))
    with pytest.raises(ValueError, match=r"all\.jsonl is in UTF-16; save it as UTF-8"):
        read_dataset(tmp_path / "all.jsonl")
