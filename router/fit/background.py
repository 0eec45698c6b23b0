"""Prompts that belong to no expert: follow-ups, requests of everyday life, all kinds of subjects.

A router that never saw a prompt outside its experts' domains finds a specialist for everything. So
training adds, for the base,

- short replies ("why?", "looks good, thanks"): alone they say nothing about their subject;
- chores, facts, plans, texts to write: patterns whose gaps are filled with words;
- subjects from all over (law, history, music, engineering and so on) in general forms ("Explain x
  in simple words."), so that a domain is known by its subject and not by being unfamiliar.

They are made of the lines of `background.txt`; the draw is fixed by the seed. Some may well belong
to an expert of the user's: `fit.py` drops those that a held-out classifier gives to a specialist.
"""

from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Final

_FILE: Final = Path(__file__).with_name("background.txt")
# Prompts made of each pattern, and of each subject. Chosen, not measured.
PER_PATTERN: Final = 4
PER_SUBJECT: Final = 3


@lru_cache(maxsize=1)
def sections() -> dict[str, list[str]]:
    """Return the lines of each section; a backslash and an n in a line stand for its end."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line.replace("\\n", "\n"))
    return found


def followups() -> list[str]:
    """Return every short reply as it is typed in haste and as it is written with care."""
    forms = [
        (text, end)
        for key, end in (("questions", "?"), ("replies", "."))
        for text in sections()[key]
    ]
    return [form for text, end in forms for form in (text, text[0].upper() + text[1:] + end)]


def everyday_prompts(seed: int = 0) -> list[str]:
    """Return requests of everyday life, without duplicates, in a fixed order."""
    random = Random(seed)
    words = dict(map(_list, sections()["words"]))
    texts = [_fill(p, words, random) for p in sections()["patterns"] for _ in range(PER_PATTERN)]
    return list(dict.fromkeys(texts))


def subject_prompts(seed: int = 0) -> dict[str, str]:
    """Return subjects in general forms, in a fixed order, each with the field it is from."""
    random = Random(seed)
    fields = {}
    for field, subjects in map(_list, sections()["subjects"]):
        for x in subjects:
            others = [subject for subject in subjects if subject != x]
            for form in random.sample(sections()["forms"], PER_SUBJECT):
                y, z = random.sample(others, 2)
                text = form.format(x=x, y=y, z=z)
                careful = form[0] == "{" and random.random() < 0.5
                fields[text[0].upper() + text[1:] if careful else text] = field
    return fields


def _list(line: str) -> tuple[str, list[str]]:
    """A line "name: item; item"."""
    name, _, items = line.partition(": ")
    return name, [item.strip() for item in items.split(";")]


def _fill(pattern: str, words: dict[str, list[str]], random: Random) -> str:
    """Put a word into every gap; sentences of a passage have gaps themselves."""
    if "{passage}" in pattern:
        sentences = random.sample(sections()["sentences"], random.randint(4, 8))
        pattern = pattern.replace("{passage}", " ".join(sentences))
    while "{" in pattern:
        start = pattern.index("{")
        end = pattern.index("}", start)
        pattern = (
            pattern[:start] + random.choice(words[pattern[start + 1 : end]]) + pattern[end + 1 :]
        )
    return pattern
