"""Prompts for `routing.py`: which are trained on, and how each test is made of the test files.

DATA/DOMAIN/{train,test}.jsonl with rows of `prompt`, for math (GSM8K), code (MBPP), sql (WikiSQL with
the table's columns), shell (NL2Bash), medical (MedQuAD), finance (TAT-QA) and general (OASST1,
self-instruct); DATA/ood/val.jsonl (out-of-scope queries of CLINC150); DATA/multiturn/*.jsonl. Nothing
but the files `train.jsonl` of the seven domains is trained on.

Bare prompts have the frame of their data set removed (`bare`). Shifted prompts are of a known
domain in a form that was not trained on. Two kinds are measured:
- styles: the training rows of one form are left out, and the test rows of that form are asked
  (`STYLES`);
- other data sets of the domain, DOMAIN.jsonl in a folder that the caller names (HumanEval for code,
  PubMedQA's questions for medical, SVAMP for math, Spider's development questions without their
  schema for sql).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltamux.router.fit.data import Dataset, Prompt

DOMAINS = ("code", "finance", "general", "math", "medical", "shell", "sql")
SPECIALISTS = tuple(domain for domain in DOMAINS if domain != "general")
Row = dict[str, Any]

# The form of a domain that is left out of training, by what its rows look like.
STYLES: dict[str, Callable[[Row], bool]] = {
    "code": lambda row: row["prompt"].startswith("Write a python function"),
    "finance": lambda row: row["answer_type"] == "arithmetic",
    "math": lambda row: "how many" not in row["prompt"].lower(),
    "medical": lambda row: row["qtype"] in ("treatment", "causes", "outlook"),
    "shell": lambda row: not row["prompt"].lower().startswith(("find", "search", "list")),
    "sql": lambda row: not row["question"].lower().startswith(("what", "how")),
}

# Said in a conversation; none of these is among the phrases that training adds.
FOLLOW_UPS = (
    "Why is that?", "Can you elaborate on this?", "Please continue.", "Could you redo that?",
    "That's not quite what I meant.", "Say it differently.", "Is there a simpler way?",
    "I think there is a mistake.", "and what about the other case?", "Give me one more.",
    "ok great, go on please", "Can you double-check?", "hmm, are you certain", "Nice, thank you!",
    "What was the first step again?", "make it a bit longer", "Why did you do it like this?",
    "tell me more", "Please summarize what you said.", "Now the same once again but shorter.",
    "I don't get the second part.", "Does it always work?", "what if it doesn't work",
    "Perfect, next one.", "Could you explain the last line?",
)  # fmt: skip

DESCRIPTIONS = {
    "code": "Programming: write a Python function for a described task over lists and strings.",
    "finance": "Questions about a company's annual report: revenue, expenses, assets, tax, shares.",
    "math": "Word problems about everyday amounts, prices and times, solved step by step.",
    "medical": "Questions about diseases, symptoms, causes, treatments and inheritance.",
    "shell": "Linux command line: find, list, copy, archive or search files and directories.",
    "sql": "Questions about the rows and columns of a database table, answered with SQL.",
}


@dataclass(frozen=True)
class Corpus:
    """Rows by domain, in the order of the files."""

    train: dict[str, list[Row]]
    test: dict[str, list[Row]]
    out_of_scope: list[str]
    coffee: list[list[str]]
    shifted: dict[str, list[str]]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_corpus(data: Path, shifted: Path | None) -> Corpus:
    files = sorted(shifted.glob("*.jsonl")) if shifted else []
    dialogues = read_rows(data / "multiturn" / "taskmaster4_coffee.jsonl")
    return Corpus(
        train={name: read_rows(data / name / "train.jsonl") for name in DOMAINS},
        test={name: read_rows(data / name / "test.jsonl") for name in DOMAINS},
        out_of_scope=[row["prompt"] for row in read_rows(data / "ood" / "val.jsonl")],
        coffee=[row["turns"] for row in dialogues],
        shifted={file.stem: [row["prompt"] for row in read_rows(file)] for file in files},
    )


def bare(domain: str, row: Row) -> str:
    """The request without the frame of its data set; math, shell, medical, general have none."""
    if domain in ("sql", "finance"):
        return str(row["question"])
    if domain == "code":
        first = row["prompt"].split("\n")[0]
        frame = r"^Write an? (python )?function (to |that |which |for |of )?"
        return re.sub(frame, "", first, flags=re.IGNORECASE)
    return str(row["prompt"])


def dataset(rows: dict[str, list[Row]]) -> Dataset:
    """Rows as a fit takes them, without duplicates."""
    prompts = [Prompt((row["prompt"],), name) for name, own in rows.items() for row in own]
    distinct = list(dict.fromkeys(prompts))
    return Dataset(distinct, [], len(prompts) - len(distinct), [])


def sample(
    rows: dict[str, list[Row]], count: int, rng: np.random.Generator
) -> dict[str, list[Row]]:
    """At most `count` rows of each domain."""
    return {
        name: [own[index] for index in rng.permutation(len(own))[:count]]
        for name, own in rows.items()
    }
