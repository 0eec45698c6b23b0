"""Rows as chat APIs, training libraries and tables of data write them, read or refused by line."""

import json

import pytest

from deltamux.compression.streaming.rows import read_rows

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
PLAIN = [USER, ANSWER]
CALL = {"type": "function", "id": "1", "function": {"name": "sum", "arguments": '{"a": 1}'}}
PARTS = [{"type": "text", "text": "Add 2"}, {"type": "text", "text": "and 3"}]
IMAGE = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
TOOL = {"type": "function", "function": {"name": "sum"}}


def read_one(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = read_rows(path)
    return found


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "a", "response": "b"}, PLAIN),
        ({"prompt": "a", "completion": "b"}, PLAIN),
        ({"prompt": [USER], "completion": [ANSWER]}, PLAIN),
        ({"prompt": [USER], "response": ANSWER}, PLAIN),
        ({"prompt": [USER], "response": "b"}, PLAIN),
        ({"prompt": [{"type": "text", "text": "a"}], "response": "b"}, PLAIN),
        ({"messages": None, "prompt": "a", "response": "b"}, PLAIN),
        ({"messages": PLAIN, "prompt": None}, PLAIN),
        (
            {"system": "c", "prompt": "a", "response": "b"},
            [{"role": "system", "content": "c"}, *PLAIN],
        ),
        ({"prompt": 1, "response": 2.5}, [USER | {"content": "1"}, ANSWER | {"content": "2.5"}]),
        ({"messages": [USER | {"content": PARTS}, ANSWER]}, [USER | {"content": "Add 2\nand 3"}, ANSWER]),
        ({"messages": [USER | {"name": None, "tool_calls": None}, ANSWER]}, PLAIN),
        ({"messages": [USER | {"name": "n"}, ANSWER]}, [USER | {"name": "n"}, ANSWER]),
        ({"messages": [{"role": "developer", "content": "d"}, *PLAIN]}, [{"role": "developer", "content": "d"}, *PLAIN]),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_becomes_messages(tmp_path, row, messages):
    found = read_one(tmp_path, row)
    assert found == messages
    assert found.tools is None


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize("content", [None, ""])
def test_calls_of_tools_are_kept_with_their_arguments_as_objects(tmp_path, arguments, content):
    call = CALL | {"function": {"name": "sum", "arguments": arguments}}
    asks = {"role": "assistant", "content": content, "tool_calls": [call]}
    says = {"role": "tool", "tool_call_id": "1", "content": "3"}
    _, called, result, _ = read_one(tmp_path, {"messages": [USER, asks, says, ANSWER]})
    assert called["content"] == ""
    assert called["tool_calls"] == [CALL | {"function": {"name": "sum", "arguments": {"a": 1}}}]
    assert result == says


@pytest.mark.parametrize("arguments", [None, "", "null", {}])
def test_a_call_without_arguments_has_none(tmp_path, arguments):
    call = {"function": {"name": "now", "arguments": arguments}}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    assert read_one(tmp_path, row)[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_a_call_without_its_wrapping_gets_it(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "now"}]}]}
    (call,) = read_one(tmp_path, row)[1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "now", "arguments": {}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_an_array_or_its_text(tmp_path, tools):
    assert read_one(tmp_path, {"messages": PLAIN, "tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tmp_path, tools):
    assert read_one(tmp_path, {"messages": PLAIN, "tools": tools}).tools is None


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_kept_under_the_names_that_templates_know(tmp_path, key):
    answer = read_one(tmp_path, {"messages": [USER, ANSWER | {key: "because"}]})[1]
    assert answer["reasoning"] == answer["reasoning_content"] == "because"


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ({"prompt": None, "response": "a"}, "prompt is null, not text"),
        ({"prompt": "a", "response": None}, "response is null, not text"),
        ({"prompt": "a", "response": False}, "response is a boolean, not text"),
        ({"prompt": "a", "response": {"text": "b"}}, "response[0] is no message with role and content"),
        ({"prompt": IMAGE, "response": "a"}, "prompt has a part of type 'image_url', only text is read"),
        ({"messages": [USER | {"content": IMAGE}, ANSWER]}, "messages[0].content has a part of type 'image_url'"),
        ({"messages": [USER | {"content": None}, ANSWER]}, "messages[0].content is null, not text"),
        ({"messages": [USER, ANSWER | {"content": None}]}, "messages[1].content is null, not text"),
        ({"messages": [{"content": "a"}, ANSWER]}, "messages[0] is no message"),
        ({"messages": ["a", "b"]}, "messages[0] is no message"),
        ({"messages": "a"}, "messages is text, not a list of messages"),
        ({"messages": [ANSWER]}, "the last message must be the assistant's, behind another one"),
        ({"messages": [USER]}, "the last message must be the assistant's, behind another one"),
        ({"messages": [ANSWER, USER]}, "the last message must be the assistant's, behind another one"),
        ({"messages": []}, "the last message must be the assistant's, behind another one"),
        ({"messages": None}, "got the keys 'messages'"),
        ({"instruction": "a", "output": "b"}, "got the keys 'instruction', 'output'"),
        ({"conversations": []}, "got the keys 'conversations'"),
        ({}, "got the keys of an empty row"),
        ([1], "got a list"),
        (3, "got a number"),
        (None, "got null"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["x"]}]}, "tool_calls holds text, not calls"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "x"}]}, "is text, not a list"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "holds arguments that are no JSON"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
         "holds arguments that are a list, not an object"),
        ({"messages": PLAIN, "tools": "{"}, "tools is no JSON"),
        ({"messages": PLAIN, "tools": ["x"]}, "tools holds something else than objects"),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused_by_line_and_key(tmp_path, row, finding):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(row))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: a row needs prompt and response"
    ) as caught:
        read_rows(path)
    assert finding in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = '{"prompt": "a", "response": "b"}\n'
BAD = '{"prompt": "\u00e9", "response": "b"}\n'


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ((GOOD + BAD).encode("cp1252"), "rows.jsonl:2: this is no UTF-8 text, byte 0xe9 at 45"),
        (b"\xef\xbb\xbf" + (GOOD + BAD).encode("cp1252"), "rows.jsonl:2: this is no UTF-8 text, byte 0xe9 at 48"),
        ((GOOD + BAD).encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ((GOOD + BAD).encode("utf-32"), "is UTF-32 text: save it as UTF-8"),
        ((GOOD + BAD).encode("utf-16-le"), "it holds zero bytes: save it as UTF-8"),
        (b"\x1f\x8b\x08", "rows.jsonl:1: this is no UTF-8 text, byte 0x8b"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        ((GOOD + "{\n").encode(), "rows.jsonl:2: a row needs prompt and response, or messages; this is no JSON ("),
        (b"[" + GOOD.encode() + b"]", "rows.jsonl:1: a row needs"),
    ],
    ids=["cp1252", "cp1252-mark", "utf16", "utf32", "utf16-bare", "gzip", "empty", "blank", "cut", "array"],
)  # fmt: skip
def test_a_file_of_another_encoding_is_refused_with_the_way_out(tmp_path, content, finding):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows") as caught:
        read_rows(path)
    assert finding in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_of_utf_8_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + BAD, encoding="utf-8-sig")
    assert [row[0]["content"] for row in read_rows(path)] == ["a", "\u00e9"]


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"cannot be used: (No such file|Is a directory)"):
        read_rows(tmp_path / name)
