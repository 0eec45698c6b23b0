"""Prompts that a fit adds to the labelled ones, so that the router does not learn templates alone.

- Lines: labelled prompts often share a frame ("Table t has columns: ...", "Your code should pass
  these tests: ..."), and a classifier that always saw the frame misses the bare request. Of every
  prompt of several lines, one line from its edges is added: the first of every other prompt, the
  last of the rest.
- Follow-ups: see `followups.py`; they go to the first domain that the base answers, if there is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from deltamux.router.data import Prompt
from deltamux.router.followups import followups

#: An added prompt counts a quarter of a labelled one. At full weight they cost held-out prompts of
#: experts that are phrased as commands; at a quarter most of what they teach remains.
ADDED_WEIGHT: Final = 0.25
#: Shorter lines ("Table:") are frame without content.
MIN_LINE_WORDS: Final = 4
#: Origin of a prompt that stems from no labelled one.
NO_ORIGIN: Final = -1


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        prompt: Turns and domain.
        origin: Index of the labelled prompt that it is or stems from, or `NO_ORIGIN`. Examples of
            one origin must not be on both sides of a cross-validation split.
        weight: How much it counts within its domain.
    """

    prompt: Prompt
    origin: int
    weight: float


def augment(prompts: Sequence[Prompt], experts: Mapping[str, str | None]) -> list[Example]:
    """Return the labelled prompts in their order, then the added ones.

    Args:
        prompts: Labelled prompts.
        experts: Domain to expert; None for domains that the base answers.
    """
    labelled = [Example(prompt, index, 1.0) for index, prompt in enumerate(prompts)]
    lines: dict[Prompt, int] = {}
    for index, prompt in enumerate(prompts):
        line = _edge_line(prompt.turns[0], last=index % 2 == 1)
        if line is not None:
            lines.setdefault(Prompt((line,), prompt.domain), index)
    added = [Example(prompt, origin, ADDED_WEIGHT) for prompt, origin in lines.items()]
    fallback = next((domain for domain, expert in experts.items() if expert is None), None)
    if fallback is not None:
        replies = [Prompt((text,), fallback) for text in followups()]
        added += [Example(prompt, NO_ORIGIN, ADDED_WEIGHT) for prompt in replies]
    return labelled + added


def _edge_line(text: str, *, last: bool) -> str | None:
    """First or last line of a text of several lines, None where it says too little."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        return None
    line = lines[-1 if last else 0].strip()
    return line if len(line.split()) >= MIN_LINE_WORDS else None
