"""Text for calibration and evaluation: JSONL rows, rendered by a chat template and tokenized.

A row is `{"prompt": ..., "response": ...}` or `{"messages": [...]}` whose last message is the
assistant's. Losses count response tokens only.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltamux.compression.errors import naming


@dataclass(frozen=True)
class Sample:
    """One conversation as token ids.

    Attributes:
        ids: Token ids, int64 [T].
        response_start: Index of the first token of the response.
    """

    ids: torch.Tensor
    response_start: int

    @property
    def predicted(self) -> torch.Tensor:
        """The response's tokens that have one before them to predict them."""
        return self.ids[max(self.response_start, 1) :]


class Conversation(list[dict[str, str]]):
    """Messages with role and content, and the place that they were read from."""

    place = "a conversation"


def read_rows(path: Path) -> list[Conversation]:
    """Conversations of a JSONL file.

    Raises:
        ValueError: A line is not JSON or lacks the fields; the message names file and line.
    """
    path = path.expanduser()
    with naming(path):
        content = path.read_text(encoding="utf-8-sig")
    conversations = []
    # Not splitlines: it also cuts at line separators that JSON allows inside a string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            conversation = _conversation(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: a row needs prompt and response, or messages; got {error!r}"
            ) from error
        conversation.place = f"{path}:{number}"
        conversations.append(conversation)
    if not conversations:
        raise ValueError(f"{str(path)!r} holds no rows")
    return conversations


def builtin_rows() -> list[Conversation]:
    """General conversations that come with deltamux, for experts without calibration text."""
    # Not importlib.resources: it cannot read a namespace package that is installed editable.
    return read_rows(Path(__file__).with_name("calibration.jsonl"))


def _conversation(row: dict[str, Any]) -> Conversation:
    if "messages" in row:
        messages = [{"role": m["role"], "content": _text(m["content"])} for m in row["messages"]]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise TypeError("the last message must be the assistant's, behind another one")
        return Conversation(messages)
    prompt, response = _text(row["prompt"]), _text(row["response"])
    return Conversation(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    )


def _text(content: object) -> str:
    """A message's text: a string, a number, or text parts as the OpenAI API has them."""
    if isinstance(content, str | int | float) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {part.get("type") for part in content}
        if kinds <= {"text"}:
            return "".join(_text(part["text"]) for part in content)
        raise TypeError(f"content must be text, got parts of type {sorted(map(str, kinds))}")
    raise TypeError(f"content must be text, got {type(content).__name__}")


def find_tokenizer(*directories: Path) -> Path | None:
    """The first directory that holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    for directory in directories:
        if any((directory / name).is_file() for name in names):
            return directory
    return None


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: Its files are damaged.
    """
    from transformers import AutoTokenizer

    with naming(f"the tokenizer in {str(directory)!r}", "fetch or save it again"):
        return AutoTokenizer.from_pretrained(directory)


def random_samples(vocabulary: int, count: int, length: int) -> list[Sample]:
    """Uniformly random token ids: what is left to calibrate on where there is no tokenizer.

    Args:
        vocabulary: Number of token ids.
        count: Number of samples.
        length: Tokens of each, at least 2; the second half counts as response.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    return [Sample(row, length // 2) for row in ids]


def encode_rows(
    rows: Sequence[list[dict[str, str]]],
    tokenizer_directory: Path,
    max_tokens: int,
    template: str | None = None,
    stop_ids: Collection[int] = (),
) -> list[Sample]:
    """Render and tokenize conversations.

    Args:
        rows: Conversations that end with the assistant's message.
        tokenizer_directory: A checkpoint with its tokenizer.
        max_tokens: Longer conversations are cut at their end.
        template: The chat template; None: the tokenizer's own, or none where it has none.
        stop_ids: Tokens besides the tokenizer's own that end a turn.

    Returns:
        The samples of which at least one response token is left.

    Raises:
        ValueError: The template refuses a conversation, or nothing is left of any response.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    ends = {tokenizer.eos_token_id, *stop_ids}
    samples = []
    for messages in rows:
        place = getattr(messages, "place", Conversation.place)
        with naming(place, "change the row, or the chat template"):
            prompt, whole = _rendered(messages, tokenizer, template or tokenizer.chat_template)
            ids, start = _encoded(tokenizer, whole), len(_encoded(tokenizer, prompt))
        # What a template writes behind the end of the turn is nothing that a model says.
        last = [i for i in range(start, len(ids)) if ids[i] in ends]
        ids = ids[: last[-1] + 1 if last else None][:max_tokens]
        if start < len(ids):
            samples.append(Sample(torch.tensor(ids), start))
    if not samples:
        raise ValueError(
            f"no row leaves a response token within {max_tokens} tokens: raise the limit"
        )
    return samples


def _rendered(
    messages: list[dict[str, str]], tokenizer: Any, template: str | None
) -> tuple[str, str]:
    """A conversation up to its response, and all of it."""
    if template is None:
        prompt = "\n".join(message["content"] for message in messages[:-1]) + "\n"
        return prompt, prompt + messages[-1]["content"]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, chat_template=template
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    return prompt, whole


def _encoded(tokenizer: Any, text: str) -> list[int]:
    # Half of a surrogate pair, which JSON allows, is no text that a tokenizer takes.
    clean = text.encode("utf-8", "replace").decode("utf-8")
    ids: list[int] = tokenizer(clean, add_special_tokens=False)["input_ids"]
    return ids
