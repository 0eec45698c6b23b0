"""Conversations as the server will read them for an expert: the base's tokenizer, the expert's chat template.

One engine has one tokenizer, the base's. A template comes with each expert; an expert without one is answered with
the base's. Text that is calibrated and verified on is read in this way too, so that what is measured is what will
be served, and where the expert itself would read differently, that is said.
"""

from dataclasses import dataclass
from pathlib import Path

from deltamux.compression.checkpoint.architecture import LM_HEAD, is_tied
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.checkpoint.settings import own_template
from deltamux.compression.streaming.reading import TextReport
from deltamux.compression.streaming.rows import Conversation
from deltamux.compression.streaming.same_tokenizer import (
    smaller_differences,
    tokenizer_difference,
)
from deltamux.compression.streaming.stops import stop_ids
from deltamux.compression.streaming.text import (
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

    def described(self) -> str:
        """Which tokenizer and which template, in a line."""
        template = "the tokenizer's own" if self.template is None else "the expert's"
        return f"the tokenizer in {str(self.tokenizer)!r}, {template} chat template"

    def samples(
        self, rows: list[Conversation], max_tokens: int, report: TextReport | None = None
    ) -> list[Sample]:
        """Conversations as token ids (see `encode_rows`)."""
        return encode_rows(
            rows, self.tokenizer, max_tokens, self.template, self.stop_ids, report=report
        )


def served_reading(base: Checkpoint, expert: Checkpoint) -> Reading | None:
    """How the server will read conversations for an expert; None where nothing has a tokenizer."""
    found = find_tokenizer(base.root, expert.root)
    if found is None:
        return None
    return Reading(found, own_template(expert.root), frozenset(stop_ids(expert.root)))


def check_tokenizer(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Refuse an expert whose tokenizer reads text differently than the base's.

    Returns:
        Smaller differences, a line each.

    Raises:
        ValueError: The message names the first token, merge or text.
    """
    own, served = find_tokenizer(expert.root), find_tokenizer(base.root)
    if own is None or served is None or own == served:
        return []
    pair = load_tokenizer(served), load_tokenizer(own)
    finding = tokenizer_difference(*pair)
    if finding:
        raise ValueError(
            f"{finding}; the server reads all text with the base's: where the expert was trained "
            f"with its own, copy its tokenizer files into {base.source!r}, else the base's into "
            f"{expert.source!r}"
        )
    return smaller_differences(*pair)


def assumptions(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What the files leave open, and how it is taken, a line each."""
    found = []
    own, served = find_tokenizer(expert.root), find_tokenizer(base.root)
    if served is not None and own is None:
        found.append(f"{expert.source!r} has no tokenizer: read with the base's")
    if served is None and own is not None:
        found.append(f"{base.source!r} has no tokenizer: read with the expert's")
    templates = own_template(expert.root), own_template(base.root)
    if templates == (None, None):
        found.append("neither has a chat template: messages are read as lines of text")
    elif templates[0] is None:
        found.append(f"{expert.source!r} has no chat template: it is served with the base's")
    if expert.tied and not is_tied(expert.config):
        found.append(f"{expert.source!r} has no {LM_HEAD!r}: its embedding stands for it")
    return found
