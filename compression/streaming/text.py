"""From conversations to token ids: the chat template, the tokenizer, and what does not fit.

A sample is what the model reads (the prompt, as the server renders it) and what it is to say (the last message, up to
the token that ends the turn). Losses count response tokens only. What a template writes around the response is the
prompt's; where a template rewrites the response (drops reasoning from it, or adds to messages in front of it), the
sample is the prompt and then the response as it was written, which is what a server gives and an expert says.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltamux.compression.errors import naming
from deltamux.compression.streaming.reading import TextReport
from deltamux.compression.streaming.rows import REASONING, Conversation, Message

# A mark that a generation prompt may open the response with, such as <think>.
OPENING = re.compile(r"\s*(<[^<>\s]+>|\[[A-Z_]+\])\s*")
# Stands for a response, to see what a template puts in front of it.
PROBE = "deltamux probe 8f3c"


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
    rows: Sequence[list[Message]],
    tokenizer_directory: Path,
    max_tokens: int,
    template: str | None = None,
    stop_ids: Collection[int] = (),
    *,
    report: TextReport | None = None,
) -> list[Sample]:
    """Render and tokenize conversations.

    Args:
        rows: Conversations that end with the assistant's message.
        tokenizer_directory: A checkpoint with its tokenizer.
        max_tokens: Longer conversations lose the beginning of their prompt, and then the end of their response.
        template: The chat template; None: the tokenizer's own, or none where it has none.
        stop_ids: Tokens besides the tokenizer's own that end a turn.
        report: Takes note of what is used, cut and dropped.

    Returns:
        The samples; a row without a response is dropped.

    Raises:
        ValueError: The template refuses a conversation, or no row has a response.
    """
    report = report or TextReport()
    reader = _Reader(load_tokenizer(tokenizer_directory), template, frozenset(stop_ids), report)
    found = (reader.sample(messages, max_tokens) for messages in rows)
    samples = [sample for sample in found if sample is not None]
    if not samples:
        reason = f" ({report.dropped[0][0]}: {report.dropped[0][1]})" if report.dropped else ""
        raise ValueError(f"no row leaves a response to calibrate or measure on{reason}")
    return samples


def _shortened(
    ids: list[int], start: int, max_tokens: int, first: int | None
) -> tuple[list[int], int]:
    """The end of the prompt and the beginning of the response; at least half of the limit is the response's.

    The token that every text begins with stays in front: models lean on it.
    """
    prompt, response = ids[:start], ids[start:]
    response = response[: max(max_tokens - len(prompt), max_tokens // 2)]
    room = max_tokens - len(response)
    if len(prompt) > room:
        kept = prompt[:1] if room > 1 and prompt[0] == first else []
        prompt = kept + prompt[len(prompt) - room + len(kept) :]
    return prompt + response, len(prompt)


class _Unusable(Exception):
    """A row has no response that could be read; the message says why."""


def _check_shown(answer: Message, shown: str) -> None:
    """Refuse a response with calls or reasoning of which a template does not show all."""
    names = [call["function"]["name"] for call in answer.get("tool_calls", [])]
    if not all(name in shown for name in names):
        raise _Unusable("the chat template does not show its call of a tool")
    thoughts = [answer[key] for key in REASONING if isinstance(answer.get(key), str)]
    if thoughts and not any(thought.strip() in shown for thought in thoughts):
        raise _Unusable("the chat template does not show its reasoning")
    if str(answer["content"]).strip() not in shown:
        raise _Unusable("the chat template rewrites its response")


class _Reader:
    """A tokenizer with a chat template; notes in a report what becomes of rows."""

    def __init__(
        self, tokenizer: Any, template: str | None, stop_ids: frozenset[int], report: TextReport
    ) -> None:
        self._tokenizer, self._report = tokenizer, report
        self._template = template or tokenizer.chat_template
        if isinstance(self._template, dict):
            self._template = self._template.get("default")
        self._ends = {tokenizer.eos_token_id, *stop_ids}
        self._takes_parts = self._template is not None and self._reads_parts()

    def sample(self, messages: list[Message], max_tokens: int) -> Sample | None:
        """A conversation within a limit; None where it has no response that could be read."""
        place = getattr(messages, "place", Conversation.place)
        try:
            with naming(place, "change the row, or the chat template"):
                ids, start = self._encoded(messages, place)
        except _Unusable as error:
            self._report.dropped.append((place, str(error)))
            return None
        if len(ids) > max_tokens:
            ids, start = _shortened(ids, start, max_tokens, self._tokenizer.bos_token_id)
            self._report.cut.append(place)
        sample = Sample(torch.tensor(ids), start)
        self._report.add(len(ids), len(sample.predicted))
        return sample

    def _encoded(self, messages: list[Message], place: str) -> tuple[list[int], int]:
        """Token ids of a conversation up to the end of its last turn, and where its response starts."""
        if self._template is None:
            context = "\n".join(str(message["content"]) for message in messages[:-1]) + "\n"
            return self._ended(*self._split(context, context + str(messages[-1]["content"])))
        tools = getattr(messages, "tools", None)
        if tools and "tools" not in self._template:
            self._report.assume("the chat template does not show tools", place)
        prompt = self._rendered(messages[:-1], tools, add_generation_prompt=True)
        whole = self._rendered(messages, tools)
        *before, answer = messages
        if not set(answer) - {"role", "content", "name"}:
            probe = [*before, answer | {"content": PROBE}]
            lead = self._rendered(probe, tools).partition(PROBE)[0]
            said = str(answer["content"]).strip()
            behind = lead.startswith(prompt) and whole.startswith(lead)
            if behind and whole[len(lead) :].lstrip().startswith(said):
                return self._ended(*self._split(lead, whole))
            return self._as_written(prompt, whole, str(answer["content"]), place)
        _check_shown(answer, whole[len(prompt) :] if whole.startswith(prompt) else "")
        return self._ended(*self._split(prompt, whole))

    def _as_written(self, prompt: str, whole: str, text: str, place: str) -> tuple[list[int], int]:
        """The prompt, and behind it a response that the template would rewrite."""
        self._report.assume(
            "the chat template rewrites the response: it is read as it was written", place
        )
        opening = OPENING.match(text)
        if opening and prompt.rstrip().endswith(opening[1]):
            text = text[opening.end() :]
        end = [each for each in self._ids(whole) if each in self._ends][-1:]
        ids, start = self._split(prompt, prompt + text)
        return ids + end, start

    def _rendered(self, messages: list[Message], tools: Any, **options: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [self._for_template(message) for message in messages],
            tools=tools,
            tokenize=False,
            chat_template=self._template,
            **options,
        )
        return text

    def _for_template(self, message: Message) -> Message:
        if message["role"] == "developer" and "developer" not in self._template:
            message = message | {"role": "system"}
        if self._takes_parts and message["content"] and message["role"] != "tool":
            return message | {"content": [{"type": "text", "text": message["content"]}]}
        return message

    def _reads_parts(self) -> bool:
        """Whether the template wants content as typed parts and cannot read plain text."""
        found = []
        for content in (PROBE, [{"type": "text", "text": PROBE}]):
            try:
                text = self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    tokenize=False,
                    chat_template=self._template,
                )
            except Exception:
                # A template may refuse any conversation, this one too: rows are what counts.
                text = ""
            found.append(PROBE in text and "'type'" not in text)
        return found == [False, True]

    def _ended(self, ids: list[int], start: int) -> tuple[list[int], int]:
        """Without what the template writes behind the end of the turn, which no model says."""
        last = [index for index in range(start, len(ids)) if ids[index] in self._ends]
        ids = ids[: last[-1] + 1 if last else None]
        if start == len(ids):
            raise _Unusable("its response is empty")
        return ids, start

    def _split(self, context: str, whole: str) -> tuple[list[int], int]:
        """Ids of a text, and the first of them that is not the context's."""
        ids, before = self._ids(whole), self._ids(context)
        same = (one == other for one, other in zip(ids, before, strict=False))
        start = next((index for index, equal in enumerate(same) if not equal), None)
        return ids, min(len(ids), len(before)) if start is None else start

    def _ids(self, text: str) -> list[int]:
        # Half of a surrogate pair, which JSON allows, is no text that a tokenizer takes.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        # A template writes the marks that a text begins with itself; plain text gets them from the tokenizer.
        special = self._template is None
        ids: list[int] = self._tokenizer(clean, add_special_tokens=special)["input_ids"]
        return ids
