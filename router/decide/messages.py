"""The user's words in a request: which parts of it the router reads.

Only user turns count. System prompts and tool results are the application's words, and the
assistant's turns already are an expert's. Everything that is not text (images, audio, tool results)
is skipped. Nothing here raises, whatever a client sends.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeVar

# Characters kept at each end of a turn. 4,000 characters hold the 512 tokens that the features
# read from each end of the conversation unless a token is longer than eight characters on average.
EDGE_CHARS: Final = 4_000
# Turns kept at each end of a conversation.
EDGE_TURNS: Final = 128

Turn = TypeVar("Turn")

_TEXT_PARTS: Final = frozenset({"text", "input_text"})


def user_turns(messages_or_prompt: object) -> list[str]:
    """Return the text of every user turn, oldest first.

    Args:
        messages_or_prompt: A prompt, or a list of messages in the shape of the OpenAI chat and
            Responses APIs or of Anthropic's messages (mappings or objects with `role` and
            `content`; content is a string, None, or a list of parts). Bare strings in the list are
            user turns. Lists and tuples are read; other iterables are not, since reading a one-shot
            iterator would take it from whoever answers the request.

    Returns:
        Turns that hold some text, each at most 2 * `EDGE_CHARS` characters, at most 2 * `EDGE_TURNS`
        of them. Lone surrogates are replaced, so every turn can be encoded as UTF-8.
    """
    if isinstance(messages_or_prompt, str):
        messages_or_prompt = [messages_or_prompt]
    if not isinstance(messages_or_prompt, list | tuple):
        return []
    texts = (_user_text(message) for message in messages_or_prompt)
    turns = [bound_text(text) for text in texts if text.strip()]
    return bound_turns(turns)


def bound_text(text: str) -> str:
    """Return the first and the last `EDGE_CHARS` characters of a text, valid as UTF-8."""
    if len(text) > 2 * EDGE_CHARS:
        text = text[:EDGE_CHARS] + text[-EDGE_CHARS:]
    return text.encode("utf-8", "replace").decode("utf-8")


def bound_turns(turns: list[Turn]) -> list[Turn]:
    """Return the first and the last `EDGE_TURNS` turns."""
    if len(turns) <= 2 * EDGE_TURNS:
        return turns
    return turns[:EDGE_TURNS] + turns[-EDGE_TURNS:]


def _user_text(message: object) -> str:
    """Text of one message, empty unless it is a user's."""
    if isinstance(message, str):
        return message
    if _field(message, "role") != "user":
        return ""
    content = _field(message, "content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""
    return "\n".join(text for part in content if (text := _part_text(part)))


def _part_text(part: object) -> str:
    """Text of one content part, empty unless it is a text part."""
    if isinstance(part, str):
        return part
    text = _field(part, "text")
    kind = _field(part, "type")
    is_text = isinstance(kind, str) and kind in _TEXT_PARTS
    return text if is_text and isinstance(text, str) else ""


def _field(item: object, name: str) -> Any:
    """Value of a mapping's key or of an object's attribute, None where it has neither."""
    if isinstance(item, Mapping):
        return item.get(name)
    return getattr(item, name, None)
