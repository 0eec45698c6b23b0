import json
import shutil

import pytest
from transformers import AutoTokenizer

from deltamux.compression.streaming.text import builtin_rows, encode_rows, read_rows

PAIR = [
    {"role": "user", "content": "add 2 and 3"},
    {"role": "assistant", "content": "five, é"},
]


@pytest.fixture(scope="module")
def tokenizer_root(make_pair):
    return make_pair()[0]


@pytest.fixture(scope="module")
def no_template_root(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    checkpoints.save_tokenizer(directory)
    (directory / "chat_template.jinja").unlink()
    return directory


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def decode(root, ids):
    return AutoTokenizer.from_pretrained(root).decode(ids)


def test_prompt_and_response_become_two_messages(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b", "extra": 1})
    assert read_rows(path) == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ]


def test_messages_are_taken_as_they_are(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, *PAIR, *PAIR]
    assert read_rows(write(tmp_path / "rows.jsonl", {"messages": messages})) == [messages]


def test_empty_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a", "response": "b"}\n\n  \n{"prompt": "c", "response": "d"}')
    assert len(read_rows(path)) == 2


def test_windows_line_ends_are_line_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\r\n{"prompt": "c", "response": "d"}\r\n')
    assert [row[1]["content"] for row in read_rows(path)] == ["b", "d"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separators_inside_a_string_do_not_end_the_row(tmp_path, separator):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": f"one{separator}two", "response": "b"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path)[0][0]["content"] == f"one{separator}two"


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"prompt": "a"}',
        '{"response": "b"}',
        "[1]",
        "3",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant"}]}',
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a", "response": "b"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: a row needs prompt and response"):
        read_rows(path)


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(write(tmp_path / "rows.jsonl"))


def test_built_in_rows_end_with_the_assistant():
    rows = builtin_rows()
    assert len(rows) >= 32
    assert all(row[-1]["role"] == "assistant" and row[-1]["content"] for row in rows)


def test_the_response_is_the_assistant_s_text_and_what_the_template_ends_it_with(tokenizer_root):
    sample = encode_rows([PAIR], tokenizer_root, max_tokens=512)[0]
    start = sample.response_start
    assert decode(tokenizer_root, sample.ids[start:]) == "five, é<|end|>"
    assert decode(tokenizer_root, sample.ids[:start]) == "<|user|>add 2 and 3<|end|><|assistant|>"


def test_only_the_last_message_is_the_response(tokenizer_root):
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    sample = encode_rows([first + PAIR], tokenizer_root, max_tokens=512)[0]
    assert decode(tokenizer_root, sample.ids[sample.response_start :]) == "five, é<|end|>"


def test_long_conversations_are_cut_at_their_end(tokenizer_root):
    whole = encode_rows([PAIR], tokenizer_root, max_tokens=512)[0]
    cut = encode_rows([PAIR], tokenizer_root, max_tokens=whole.response_start + 3)[0]
    assert cut.response_start == whole.response_start
    assert cut.ids.tolist() == whole.ids[: whole.response_start + 3].tolist()


def test_rows_without_a_response_token_left_are_dropped(tokenizer_root):
    long = [{"role": "user", "content": "a" * 100}, PAIR[1]]
    assert len(encode_rows([long, PAIR, long], tokenizer_root, max_tokens=50)) == 1


def test_a_limit_that_leaves_no_response_at_all_is_refused(tokenizer_root):
    with pytest.raises(ValueError, match="no row leaves a response token within 8 tokens"):
        encode_rows([PAIR], tokenizer_root, max_tokens=8)


def test_without_a_chat_template_messages_are_lines(no_template_root):
    sample = encode_rows([PAIR], no_template_root, max_tokens=512)[0]
    assert decode(no_template_root, sample.ids) == "add 2 and 3\nfive, é"
    assert decode(no_template_root, sample.ids[sample.response_start :]) == "five, é"


def test_the_expert_s_own_template_is_applied(tokenizer_root, tmp_path):
    root = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_root, root)
    (root / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    )
    sample = encode_rows([PAIR], root, max_tokens=512)[0]
    assert decode(root, sample.ids) == "[add 2 and 3][five, é]"
    assert decode(root, sample.ids[sample.response_start :]) == "five, é]"
