"""Conversations of a JSONL file, as chat APIs and training libraries write them.

A row has `messages` (roles, text or text parts, tool calls, reasoning) that end with the assistant's, or `prompt` and
`response` (or `completion`), each a text or messages; `system` may stand beside a prompt and `tools` beside either.
Other keys are left alone. What the server does to a message before the template sees it is done here too: text parts
are joined by line ends, arguments of tool calls become objects.
"""

import codecs
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltamux.compression.errors import naming

Message = dict[str, Any]
# Byte order marks of encodings that are not UTF-8, and how they are called. UTF-32's begins with UTF-16's.
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# What templates call reasoning in front of a response.
REASONING = ("reasoning_content", "reasoning", "thinking")


class Conversation(list[Message]):
    """Messages as a chat template takes them, and the place that they were read from."""

    place = "a conversation"
    tools: list[Any] | None = None


def read_rows(path: Path) -> list[Conversation]:
    """Conversations of a JSONL file.

    Raises:
        ValueError: It cannot be read as UTF-8, or a line is no such row; the message names file and line.
    """
    path = path.expanduser()
    conversations = []
    # Not splitlines: it also cuts at line separators that JSON allows inside a string.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            conversation = _conversation(json.loads(line))
        except json.JSONDecodeError as error:
            finding = f"this is no JSON ({error.msg}, column {error.colno})"
            raise _unusable(place, finding) from error
        except TypeError as error:
            raise _unusable(place, str(error)) from error
        conversation.place = place
        conversations.append(conversation)
    if not conversations:
        raise ValueError(f"{str(path)!r} holds no rows")
    return conversations


def builtin_rows() -> list[Conversation]:
    """General conversations that come with deltamux, for experts without calibration text."""
    # Not importlib.resources: it cannot read a namespace package that is installed editable.
    return read_rows(Path(__file__).with_name("calibration.jsonl"))


def drawn(rows: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """At most `count` rows, drawn over the whole file, in the order in which they were drawn."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def _text_of(path: Path) -> str:
    with naming(path):
        # A pipe or device would block or never end; a folder is said to be one.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{str(path)!r} is no file: name a file of JSON lines")
        content = path.read_bytes()
    for mark, name in OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{str(path)!r} is {name} text: save it as UTF-8")
    if b"\0" in content:
        raise ValueError(f"{str(path)!r} is no UTF-8 text, it holds zero bytes: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if content.startswith(codecs.BOM_UTF8) else 0)
        line = content.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{path}:{line}: this is no UTF-8 text, byte {content[start]:#04x} at {start}: save "
            "the file as UTF-8"
        ) from error


def _unusable(place: str, finding: str) -> ValueError:
    return ValueError(f"{place}: a row needs prompt and response, or messages; {finding}")


def _conversation(row: object) -> Conversation:
    if not isinstance(row, dict):
        raise TypeError(f"got {_kind(row)}")
    answer = next((key for key in ("response", "completion") if key in row), "response")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
    elif "prompt" in row and answer in row:
        messages = _turns(row["prompt"], "prompt", "user")
        messages += _turns(row[answer], answer, "assistant")
    else:
        raise TypeError(f"got the keys {', '.join(map(repr, row)) or 'of an empty row'}")
    if "system" in row and row["system"] not in (None, ""):
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise TypeError("the last message must be the assistant's, behind another one")
    conversation = Conversation(messages)
    conversation.tools = _tools(row.get("tools"))
    return conversation


def _turns(value: object, key: str, role: str) -> list[Message]:
    """A prompt or response: a text, text parts, a message, or messages."""
    if isinstance(value, dict):
        return _messages([value], key)
    if isinstance(value, list) and any(isinstance(each, dict) and "role" in each for each in value):
        return _messages(value, key)
    return [{"role": role, "content": _text(value, key)}]


def _messages(value: object, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise TypeError(f"{key} is {_kind(value)}, not a list of messages")
    return [_message(each, f"{key}[{index}]") for index, each in enumerate(value)]


def _message(value: object, key: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise TypeError(f"{key} is no message with role and content")
    # Data sets with one table for all rows write what a message does not have as null.
    message: Message = {name: each for name, each in value.items() if each is not None}
    thought = next((message[key] for key in REASONING if key in message), None)
    if thought is not None:
        # Servers hand it to the template under both names.
        message |= {"reasoning": thought, "reasoning_content": thought}
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_call(call, f"{key}.tool_calls") for call in _listed(calls, key)]
    # A call or a thought says it all, and a tool may return nothing.
    silent = value["role"] == "tool" or any(key in message for key in ("tool_calls", *REASONING))
    if "content" not in message and silent:
        message["content"] = ""
    else:
        message["content"] = _text(message.get("content"), f"{key}.content")
    return message


def _call(value: object, key: str) -> dict[str, Any]:
    """A call of a tool with its arguments as an object, as templates and servers take it."""
    if not isinstance(value, dict):
        raise TypeError(f"{key} holds {_kind(value)}, not calls")
    if "function" not in value:
        return {"type": "function", "function": _function(value, key)}
    return value | {"function": _function(value["function"], key)}


def _function(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise TypeError(f"{key} holds a call without a function's name")
    arguments = value.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise TypeError(f"{key} holds arguments that are no JSON ({error.msg})") from error
    if not arguments:
        arguments = {}
    if not isinstance(arguments, dict):
        raise TypeError(f"{key} holds arguments that are {_kind(arguments)}, not an object")
    return value | {"arguments": arguments}


def _tools(value: object) -> list[Any] | None:
    """What the assistant may call; tables of text keep it as JSON in a string."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise TypeError(f"tools is no JSON ({error.msg})") from error
    if not value:
        return None
    tools = _listed(value, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise TypeError("tools holds something else than objects")
    return tools


def _listed(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{key} is {_kind(value)}, not a list")
    return value


def _text(content: object, key: str) -> str:
    """A message's text: a string, a number, or text parts as the OpenAI API has them."""
    if isinstance(content, str | int | float) and not isinstance(content, bool):
        return str(content)
    if not isinstance(content, list):
        raise TypeError(f"{key} is {_kind(content)}, not text")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TypeError(f"{key} has a part of type {kind!r}, only text is read")
    return "\n".join(part["text"] for part in parts)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
