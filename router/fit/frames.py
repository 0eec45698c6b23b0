"""Other forms of the labelled prompts, so that a router does not learn their frames alone.

Prompts of one domain often share a frame ("Write a python function to ...", "Table t has columns:
...", "Question: ..."). A classifier that never saw a prompt without it reads nothing but the frame:
it misses the bare request, and follows anyone who puts the frame in front of something else. The
frames are found in the user's own prompts: a frame is a run of first words that many lines of the
domain share. From each labelled prompt come

- its first and last line, where it has several;
- these lines without their frame;
- for some prompts, the prompt behind a frame of another domain, under its own label.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.fit.data import Prompt

# A frame is shared by this part of a domain's lines, and by this many. Chosen, not measured.
FRAME_SHARE: Final = 0.03
MIN_FRAME_LINES: Final = 3
MAX_FRAME_WORDS: Final = 8
# Words that must be left of a line without its frame. Chosen, not measured.
MIN_REST_WORDS: Final = 3
# Part of the prompts that are also put behind a foreign frame, and what such a prompt counts. Chosen,
# not measured.
FOREIGN_SHARE: Final = 0.3
FOREIGN_WEIGHT: Final = 0.25


@dataclass(frozen=True)
class View:
    """A text made from the labelled prompt number `origin`, and how much it counts."""

    text: str
    origin: int
    weight: float


def make_views(prompts: Sequence[Prompt], seed: int) -> list[View]:
    """Return the views of labelled prompts, in a fixed order for a seed.

    Args:
        prompts: Labelled prompts; of a conversation the first turn is looked at.
        seed: Of which frame is removed, and which foreign one is added.
    """
    rng = np.random.default_rng(seed)
    lines = [_lines(prompt.turns[0]) for prompt in prompts]
    by_domain: defaultdict[str, list[list[str]]] = defaultdict(list)
    for prompt, found in zip(prompts, lines, strict=True):
        by_domain[prompt.domain].append(found)
    frames = {name: find_frames(edges) for name, edges in sorted(by_domain.items())}
    # A single word ("Find") is no frame that anyone would put in front of something else.
    foreign = {name: [frame for frame in own if " " in frame] for name, own in frames.items()}
    foreign = {name: own for name, own in foreign.items() if own}
    views = []
    for index, (prompt, found) in enumerate(zip(prompts, lines, strict=True)):
        texts = _bare(found, set(frames[prompt.domain]), rng)
        views += [View(text, index, 1.0) for text in texts if text != prompt.turns[0]]
        others = [name for name in foreign if name != prompt.domain]
        if others and found and rng.random() < FOREIGN_SHARE:
            choice = foreign[others[rng.integers(len(others))]]
            body = found[-1] if rng.random() < 0.5 else prompt.turns[0]
            text = f"{choice[rng.integers(len(choice))]} {body}"
            views.append(View(text, index, FOREIGN_WEIGHT))
    return views


def find_frames(prompts: Sequence[Sequence[str]]) -> list[str]:
    """Return the frames of a domain, sorted.

    Args:
        prompts: The lines of each prompt; first and last lines are looked at.
    """
    edges = [edge for lines in prompts for edge in dict.fromkeys((*lines[:1], *lines[-1:]))]
    counts: Counter[str] = Counter()
    for edge in edges:
        words = edge.split()
        longest = min(MAX_FRAME_WORDS, len(words) - MIN_REST_WORDS)
        counts.update(" ".join(words[:n]) for n in range(1, longest + 1))
    least = max(MIN_FRAME_LINES, FRAME_SHARE * len(prompts))
    return sorted(frame for frame, count in counts.items() if count >= least)


def _bare(lines: list[str], frames: set[str], rng: np.random.Generator) -> list[str]:
    """First and last line of several, and both without their frames."""
    texts = []
    for line in dict.fromkeys((*lines[:1], *lines[-1:])):
        words = line.split()
        if len(lines) > 1 and len(words) >= MIN_REST_WORDS:
            texts.append(line)
        longest = min(MAX_FRAME_WORDS, len(words) - MIN_REST_WORDS)
        known = [n for n in range(1, longest + 1) if " ".join(words[:n]) in frames]
        if known:
            texts.append(" ".join(words[known[rng.integers(len(known))] :]))
    return texts


def _lines(text: str) -> list[str]:
    """Lines that are not blank, without surrounding space."""
    return [line.strip() for line in text.splitlines() if line.strip()]
