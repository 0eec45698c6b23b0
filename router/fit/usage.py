"""Learning from use: the decision log of a server, and what a refit with its feedback changes.

The log's lines are described in `serve/api/decision_log.py`. Feedback names who should have answered;
where the log has whole prompts, each such prompt becomes a labelled one of that expert's domain.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deltamux.router.decide.config import RouterConfig
from deltamux.router.decide.decision import BASE_NAME
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Encode
from deltamux.router.fit.data import Dataset, Prompt, parse_json

# Changed prompts that a report shows.
MAX_SHOWN: Final = 10


@dataclass(frozen=True)
class Usage:
    """What a log tells.

    Attributes:
        prompts: Id to the user's turns, of decisions that were logged with their prompts.
        unnamed: The turns of such decisions without an id.
        feedback: Id to the expert that should have answered; the last word counts.
        hashed: Decisions that were logged without their prompts.
    """

    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unnamed: list[tuple[str, ...]] = field(default_factory=list)
    feedback: dict[str, str] = field(default_factory=dict)
    hashed: int = 0

    def everything(self) -> list[tuple[str, ...]]:
        """Return every prompt once, in the order of the log."""
        return list(dict.fromkeys([*self.prompts.values(), *self.unnamed]))


@dataclass(frozen=True)
class Changes:
    """What a new router decides otherwise.

    Attributes:
        asked: Prompts that both were asked.
        moved: (Before, after) to the number of prompts.
        shown: Some of them: before, after, prompt.
        corrected: Prompts with feedback, and how many of them each router gives to its expert.
    """

    asked: int
    moved: dict[tuple[str, str], int]
    shown: list[tuple[str, str, str]]
    corrected: tuple[int, int, int]


def read_log(path: Path) -> Usage:
    """Read a decision log, and the older part beside it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line is not of the log's form, named by file and line.
    """
    usage, hashed = Usage(), 0
    parts = [part for part in (path.with_name(path.name + ".1"), path) if part.is_file()]
    if not parts:
        raise FileNotFoundError(f"no log {path}; set router.log in the server's configuration")
    for part in parts:
        with part.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                row = parse_json(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise ValueError(f"{part}, line {number}: not a line of a decision log")
                name, turns = row.get("id"), row.get("prompt")
                if isinstance(row.get("feedback"), str) and isinstance(name, str):
                    usage.feedback[name] = row["feedback"]
                elif isinstance(turns, list) and turns and isinstance(name, str):
                    usage.prompts[name] = tuple(map(str, turns))
                elif isinstance(turns, list) and turns:
                    usage.unnamed.append(tuple(map(str, turns)))
                else:
                    hashed += "hash" in row
    return Usage(usage.prompts, usage.unnamed, usage.feedback, hashed)


def labelled(usage: Usage, config: RouterConfig) -> list[Prompt]:
    """Return the prompts with feedback, each under the domain of the expert that was named.

    Raises:
        ValueError: Feedback names an expert that the router does not know.
    """
    domains = {(expert or BASE_NAME): label for label, expert in reversed(config.experts.items())}
    if unknown := set(usage.feedback.values()) - set(domains):
        raise ValueError(f"feedback names {sorted(unknown)}, the router knows {sorted(domains)}")
    return [
        Prompt(usage.prompts[name], domains[expert])
        for name, expert in usage.feedback.items()
        if name in usage.prompts
    ]


def with_feedback(dataset: Dataset, feedback: Sequence[Prompt]) -> Dataset:
    """Return a data set in which feedback stands for what it had about the same prompts."""
    told = {prompt.turns for prompt in feedback}
    kept = [prompt for prompt in dataset.prompts if prompt.turns not in told]
    added = list({prompt.turns: prompt for prompt in feedback}.values())
    return Dataset(
        [*added, *kept],
        dataset.files,
        dataset.num_duplicates,
        dataset.conflicts,
        pinned=len(added),
    )


def compare(
    old: Router, new: Router, encode: Encode, usage: Usage, feedback: Sequence[Prompt]
) -> Changes:
    """Ask both routers about everything in the log."""
    moved: Counter[tuple[str, str]] = Counter()
    shown: list[tuple[str, str, str]] = []
    asked = usage.everything()
    for turns in asked:
        before, after = (r.decide(turns, encode).expert or BASE_NAME for r in (old, new))
        if before != after:
            moved[before, after] += 1
            shown.append((before, after, turns[-1]))
    right = [
        sum(r.decide(p.turns, encode).expert == r.config.experts[p.domain] for p in feedback)
        for r in (old, new)
    ]
    return Changes(
        asked=len(asked),
        moved=dict(moved.most_common()),
        shown=shown[:MAX_SHOWN],
        corrected=(len(feedback), right[0], right[1]),
    )
