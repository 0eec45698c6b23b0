import json
import shutil

import pytest
from transformers import AutoTokenizer

from deltamux.compression.streaming.reading import TextReport
from deltamux.compression.streaming.rows import builtin_rows, drawn, read_rows
from deltamux.compression.streaming.text import encode_rows

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
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


def conversation(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def cut_text(root, prompt, response, limit):
    """(prompt, response) of what is left within a limit."""
    (sample,) = encode_rows([conversation(prompt, response)], root, max_tokens=limit)
    assert len(sample.ids) <= limit
    start = sample.response_start
    return decode(root, sample.ids[:start]), decode(root, sample.ids[start:])


@pytest.mark.parametrize(
    ("prompt", "response", "limit", "left"),
    [
        # The prompt loses its beginning, the response is whole.
        ("a" * 100, "yes", 12, ("a" * 6 + "<|end|><|assistant|>", "yes<|end|>")),
        # The prompt is whole, the response loses its end.
        ("ab", "y" * 100, 25, ("<|user|>ab<|end|><|assistant|>", "y" * 20)),
        # Both are long: half each.
        ("a" * 100, "y" * 100, 20, ("a" * 8 + "<|end|><|assistant|>", "y" * 10)),
        ("a" * 100, "y" * 100, 8, ("aa<|end|><|assistant|>", "yyyy")),
    ],
    ids=["prompt", "response", "both", "least"],
)
def test_long_conversations_keep_what_is_next_to_the_response(
    tokenizer_root, prompt, response, limit, left
):
    assert cut_text(tokenizer_root, prompt, response, limit) == left


def test_the_token_that_texts_begin_with_is_not_cut_off(tokenizer_root, tmp_path):
    root = shutil.copytree(tokenizer_root, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(root)
    tokenizer.bos_token = "<|system|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(root)
    (root / "chat_template.jinja").write_text(tokenizer.chat_template)
    prompt, response = cut_text(root, "a" * 100, "yes", 12)
    assert prompt == "<|system|>" + "a" * 5 + "<|end|><|assistant|>"
    assert response == "yes<|end|>"


def test_long_rows_among_short_ones_are_all_used_and_told(tokenizer_root, tmp_path):
    rows = [{"prompt": "word " * 700, "response": "b"}] * 4 + [{"prompt": "a", "response": "b"}] * 2
    report = TextReport("rows", 6, 6)
    found = read_rows(write(tmp_path / "rows.jsonl", *rows))
    assert len(encode_rows(found, tokenizer_root, max_tokens=64, report=report)) == 6
    assert [place.rpartition(":")[2] for place in report.cut] == ["1", "2", "3", "4"]
    assert (report.used, report.response_tokens) == (6, 12)


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


# A template of a reasoning model: the prompt opens a thought, and a turn is shown without it.
REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
NO_OPENING = REASONING.replace("<|assistant|><think>", "<|assistant|>")
EMPTY_THOUGHT = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m['content'] | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Adds a text in front where there is more than one message.
HAT = (
    "{% if messages | length > 1 %}<|system|>hat<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHOUTS = CHAT.replace("m['content']", "m['content'] | upper")
PARTS_ONLY = CHAT.replace("m['content']", "m['content'][0]['text']")
TOOLS = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}({{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}){% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
ASK = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("template", "answer", "wanted"),
    [
        pytest.param(REASONING, {"content": "<think>one</think>two"},
                     ("<|user|>1+1?<|end|><|assistant|><think>", "one</think>two<|end|>"), id="opened"),
        pytest.param(REASONING, {"content": "two"},
                     ("<|user|>1+1?<|end|><|assistant|><think>", "two<|end|>"), id="without-thought"),
        pytest.param(NO_OPENING, {"content": "<think>one</think>two"},
                     ("<|user|>1+1?<|end|><|assistant|>", "<think>one</think>two<|end|>"), id="stripped"),
        pytest.param(EMPTY_THOUGHT, {"content": " two "},
                     ("<|user|>1+1?<|end|><|assistant|><think></think>", "two<|end|>"), id="empty-thought"),
        pytest.param(EMPTY_THOUGHT, {"content": "two", "reasoning": "one"},
                     ("<|user|>1+1?<|end|><|assistant|>", "<think>one</think>two<|end|>"), id="thought"),
        pytest.param(HAT, {"content": "two"},
                     ("<|user|>1+1?<|end|><|assistant|>", "two<|end|>"), id="changed-prompt"),
        pytest.param(SHOUTS, {"content": "two"},
                     ("<|user|>1+1?<|end|><|assistant|>", "two<|end|>"), id="rewritten"),
        pytest.param(PARTS_ONLY, {"content": "two"},
                     ("<|user|>1+1?<|end|><|assistant|>", "two<|end|>"), id="parts-only"),
        pytest.param(TOOLS, {"content": None, "tool_calls": [CALL]},
                     ("<|user|>1+1?<|end|><|assistant|>", "(sum a=1)<|end|>"), id="call"),
    ],
)  # fmt: skip
def test_prompt_and_response_are_what_a_server_gives_and_an_expert_says(
    tokenizer_root, tmp_path, template, answer, wanted
):
    row = {"messages": [ASK, {"role": "assistant"} | answer]}
    rows = read_rows(write(tmp_path / "rows.jsonl", row))
    (sample,) = encode_rows(rows, tokenizer_root, 512, template)
    start = sample.response_start
    halves = sample.ids[:start], sample.ids[start:]
    assert tuple(decode(tokenizer_root, half) for half in halves) == wanted


def test_tools_of_a_row_reach_the_template(tokenizer_root, tmp_path):
    tools = [{"type": "function", "function": {"name": "sum"}}]
    row = {"messages": [ASK, PAIR[1]], "tools": json.dumps(tools)}
    rows = read_rows(write(tmp_path / "rows.jsonl", row))
    (sample,) = encode_rows(rows, tokenizer_root, 512, TOOLS)
    assert decode(tokenizer_root, sample.ids).startswith("[sum]<|user|>1+1?")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": "", "tool_calls": [CALL]}, "does not show its call of a tool"),
        ({"content": "two", "reasoning_content": "one"}, "does not show its reasoning"),
    ],
)
def test_rows_that_the_template_does_not_show_are_dropped_by_line(
    tokenizer_root, tmp_path, answer, reason
):
    bad = {"messages": [ASK, {"role": "assistant"} | answer]}
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b"}, bad)
    report = TextReport()
    assert len(encode_rows(read_rows(path), tokenizer_root, 512, CHAT, report=report)) == 1
    ((place, said),) = report.dropped
    assert place.endswith("rows.jsonl:2")
    assert reason in said
    with pytest.raises(
        ValueError, match=r"no row leaves a response .*rows\.jsonl:2: the chat template"
    ):
        encode_rows(read_rows(path)[1:], tokenizer_root, 512, CHAT)


def test_what_is_assumed_on_rows_is_told(tokenizer_root, tmp_path):
    tools = [{"type": "function", "function": {"name": "sum"}}]
    row = {"prompt": "a", "response": "b", "tools": tools}
    report = TextReport("rows.jsonl", 2, 2)
    path = write(tmp_path / "rows.jsonl", row, row)
    encode_rows(read_rows(path), tokenizer_root, 512, SHOUTS, report=report)
    text = "\n".join(report.lines("calibration"))
    assert text.startswith("calibration: 2 of 2 rows of rows.jsonl, ")
    assert "the chat template does not show tools: 2 rows (" in text
    assert "the chat template rewrites the response: it is read as it was written: 2 rows (" in text


def test_rows_are_drawn_over_the_whole_file_and_alike_every_time(tmp_path):
    rows = [{"prompt": name, "response": "b"} for name in ["A"] * 1000 + ["B"] * 1000]
    found = read_rows(write(tmp_path / "rows.jsonl", *rows))
    some = drawn(found, 128, seed=0)
    assert len(some) == 128
    assert 40 < sum(row[0]["content"] == "B" for row in some) < 88
    assert some == drawn(found, 128, seed=0)
    assert [row.place for row in some] != [row.place for row in drawn(found, 128, seed=1)]
    assert len({row.place for row in drawn(found, 5000, seed=0)}) == 2000


def test_a_half_of_a_surrogate_pair_is_read_as_a_replacement(tokenizer_root, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\\ud83d", "response": "b\\ude80"}')
    (sample,) = encode_rows(read_rows(path), tokenizer_root, 512)
    assert decode(tokenizer_root, sample.ids) == "<|user|>a?<|end|><|assistant|>b?<|end|>"


def test_an_empty_response_of_a_model_without_template_is_dropped(no_template_root):
    report = TextReport()
    rows = [conversation("a", ""), conversation("a", "b")]
    assert len(encode_rows(rows, no_template_root, 512, report=report)) == 1
    assert [reason for _, reason in report.dropped] == ["its response is empty"]
