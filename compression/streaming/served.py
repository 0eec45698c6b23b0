"""Conversations as the server will read them for an expert: the base's tokenizer, the expert's chat template.

One engine has one tokenizer, the base's. A template comes with each expert; an expert without one is answered with
the base's. Text that is calibrated and verified on is read in this way too, so that what is measured is what will
be served, and where the expert itself would read differently, that is said.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamux.compression.checkpoint.architecture import LM_HEAD
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.checkpoint.settings import own_template, read_side_settings
from deltamux.compression.streaming.text import (
    Conversation,
    Sample,
    encode_rows,
    find_tokenizer,
    load_tokenizer,
)


@dataclass(frozen=True)
class Reading:
    """How conversations become tokens.

    Attributes:
        tokenizer: The checkpoint with the tokenizer.
        template: The expert's own chat template; None: the tokenizer's.
        stop_ids: Tokens that end a turn of the expert, besides the tokenizer's own.
    """

    tokenizer: Path
    template: str | None
    stop_ids: frozenset[int] = frozenset()

    def samples(self, rows: list[Conversation], max_tokens: int) -> list[Sample]:
        """Conversations as token ids (see `encode_rows`)."""
        return encode_rows(rows, self.tokenizer, max_tokens, self.template, self.stop_ids)


def served_reading(base: Checkpoint, expert: Checkpoint) -> Reading | None:
    """How the server will read conversations for an expert; None where nothing has a tokenizer."""
    found = find_tokenizer(base.root, expert.root)
    if found is None:
        return None
    settings = read_side_settings(expert.root)
    return Reading(found, settings.template, frozenset(settings.stop_ids))


def reading_differences(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What the server will read differently than the expert itself would, a line each."""
    found = []
    if base.config.get("tie_word_embeddings") is False and base.tied:
        found.append(
            f"{base.source!r} has no {LM_HEAD!r}, though its configuration does not tie it to the "
            "embedding: taken as tied"
        )
    own, served = find_tokenizer(expert.root), find_tokenizer(base.root)
    if served is None:
        return found
    if own_template(expert.root) is None and own_template(base.root) is not None:
        found.append(f"{expert.source!r} has no chat template: it is served with the base's")
    if own is not None:
        found += _other_token(load_tokenizer(served), load_tokenizer(own))
    return found


def _other_token(served: Any, own: Any) -> list[str]:
    """The first token that two tokenizers do not share."""
    ours, theirs = served.get_vocab(), own.get_vocab()
    differing = [token for token in theirs if ours.get(token) != theirs[token]]
    if not differing:
        return []
    token = min(differing, key=lambda each: theirs[each])
    here = f"is {ours[token]}" if token in ours else "is missing"
    return [
        f"token {token!r} is {theirs[token]} in the expert's tokenizer and {here} in the base's, "
        f"which the server reads text with ({len(differing)} tokens differ): save the base with the "
        "expert's tokenizer, or expect other answers"
    ]
