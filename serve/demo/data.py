"""The demo's data: labelled prompts and answers made on the spot, without any download.

Each domain is a generator that draws one (prompt, response) pair from a random source; this file
turns generators into lists without duplicates. Everything is a function of the seed alone.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from deltamux.serve.demo import general, math, shell, sql

GENERATORS: Mapping[str, Callable[[Random], tuple[str, str]]] = {
    "math": math.draw,
    "sql": sql.draw,
    "shell": shell.draw,
    "general": general.draw,
}
SPECIALISTS = ("math", "sql", "shell")

# The same in every domain, so that courtesy tells a router nothing.
OPENINGS = ("Please help. ", "Quick question: ", "Hi! ", "Hello, ", "I need this today. ")
# Chosen, not measured.
OPENING_SHARE = 0.15
# Draws after which a generator counts as exhausted. Chosen, not measured.
DRAWS_PER_EXAMPLE = 50


@dataclass(frozen=True)
class Example:
    """A prompt and the response that an expert learns; `general` prompts have an empty one."""

    prompt: str
    response: str


def generate(domain: str, count: int, seed: int) -> list[Example]:
    """Return `count` examples of a domain with distinct prompts.

    Raises:
        ValueError: The domain is unknown, or has fewer than `count` distinct prompts.
    """
    if domain not in GENERATORS:
        raise ValueError(f"domain must be one of {sorted(GENERATORS)}, got {domain!r}")
    rng = Random(f"{domain}/{seed}")
    found: dict[str, Example] = {}
    for _ in range(count * DRAWS_PER_EXAMPLE):
        if len(found) == count:
            break
        prompt, response = GENERATORS[domain](rng)
        if rng.random() < OPENING_SHARE:
            prompt = rng.choice(OPENINGS) + prompt
        found.setdefault(prompt, Example(prompt, response))
    if len(found) < count:
        raise ValueError(
            f"domain {domain!r} gave {len(found)} distinct prompts, {count} were asked for; "
            "ask for fewer"
        )
    return list(found.values())


def train_test(
    domain: str, train_count: int, test_count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and test examples of a domain; no prompt is in both."""
    examples = generate(domain, train_count + test_count, seed)
    return examples[:train_count], examples[train_count:]


def general_prompts(count: int, seed: int) -> list[str]:
    """Distinct prompts that belong to no expert."""
    return [example.prompt for example in generate("general", count, seed)]


def write_jsonl(path: Path, rows: Iterable[Example | Mapping[str, object]]) -> None:
    """Write rows as JSON, one a line; the file appears whole, with its parent directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    with scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            record = asdict(row) if isinstance(row, Example) else dict(row)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    scratch.replace(path)
