"""Text for calibration and evaluation: JSONL rows rendered by the expert's own chat template.

A row is `{"prompt": ..., "response": ...}` or `{"messages": [...]}` whose last message is the
assistant's. Losses count response tokens only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


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


def read_rows(path: Path) -> list[list[dict[str, str]]]:
    """Conversations of a JSONL file, each a list of role/content messages.

    Raises:
        ValueError: A line is not JSON or lacks the fields; the message names file and line.
    """
    conversations = []
    # Not splitlines: it also cuts at line separators that JSON allows inside a string.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            conversations.append(_conversation(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: a row needs prompt and response, or messages; got {error!r}"
            ) from error
    if not conversations:
        raise ValueError(f"{str(path)!r} holds no rows")
    return conversations


def builtin_rows() -> list[list[dict[str, str]]]:
    """General conversations that come with deltamux, for experts without calibration text."""
    # Not importlib.resources: it cannot read a namespace package that is installed editable.
    return read_rows(Path(__file__).with_name("calibration.jsonl"))


def _conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        if not messages or messages[-1]["role"] != "assistant":
            raise TypeError("the last message must be the assistant's")
        return messages
    return [
        {"role": "user", "content": str(row["prompt"])},
        {"role": "assistant", "content": str(row["response"])},
    ]


def find_tokenizer(*directories: Path) -> Path | None:
    """The first directory that holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    for directory in directories:
        if any((directory / name).is_file() for name in names):
            return directory
    return None


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
    rows: list[list[dict[str, str]]], tokenizer_directory: Path, max_tokens: int
) -> list[Sample]:
    """Render and tokenize conversations.

    Args:
        rows: Conversations that end with the assistant's message.
        tokenizer_directory: A checkpoint with its tokenizer and, if it has one, chat template.
        max_tokens: Longer conversations are cut at their end.

    Returns:
        The samples of which at least one response token is left.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    samples = []
    for messages in rows:
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True
            )
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
        else:
            prompt = "\n".join(message["content"] for message in messages[:-1]) + "\n"
            whole = prompt + messages[-1]["content"]
        ids, start = encode(whole), len(encode(prompt))
        # What a template writes behind the end of the turn is nothing that a model says.
        ends = [i for i in range(start, len(ids)) if ids[i] == tokenizer.eos_token_id]
        ids = ids[: ends[-1] + 1 if ends else None][:max_tokens]
        if start < len(ids):
            samples.append(Sample(torch.tensor(ids), start))
    if not samples:
        raise ValueError(
            f"no row leaves a response token within {max_tokens} tokens: raise the limit"
        )
    return samples
