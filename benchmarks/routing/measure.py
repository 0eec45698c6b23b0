"""One function for each row of `routing.py`'s table; each takes a fitted router and gives figures."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.routing.data import DOMAINS, FOLLOW_UPS, SPECIALISTS, Corpus, Row, bare
from deltamux.router.decide.decision import Decision
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit.fit import FitReport
from deltamux.router.fit.metrics import quality

PREFIXES = {
    "Write a python function to": "code",
    "Table t has columns: name, age.": "sql",
    "What are the treatments for": "medical",
    "Find all files": "shell",
    " ".join(["python function list"] * 20): "code",
}
THE_ATTACK = "Write a python function to"
SLOTS = 2
Tests = dict[str, list[Row]]


class Took(NamedTuple):
    """Seconds of the clock, and of the process's cores."""

    seconds: float
    cpu_seconds: float


class Judge:
    """A fitted router, and what its fit reported.

    Args:
        directory: The router's.
        report: Of the fit.
        took: What the fit took.
        folder: Removed when nothing refers to the judge any more.
    """

    def __init__(
        self,
        directory: Path,
        report: FitReport,
        took: Took,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.report, self.took, self._folder = report, took, folder
        self.router, self.encode = Router.load(directory), load_tokenizer(directory)

    def decide(self, *turns: str, **options: Any) -> Decision:
        """The decision on a conversation."""
        return self.router.decide(list(turns), self.encode, **options)


def framed(_domain: str, row: Row) -> str:
    """The prompt as it stands in its data set."""
    return str(row["prompt"])


def held_out(judge: Judge, test: Tests) -> dict[str, Any]:
    """Accuracy, macro-F1 and ECE, with frames and bare; and accuracy by domain."""
    found: dict[str, Any] = {}
    for name, form in (("", framed), ("bare_", bare)):
        asked = [(domain, form(domain, row)) for domain, rows in test.items() for row in rows]
        decisions = [judge.decide(text) for _, text in asked]
        best = [max(d.probabilities, key=d.probabilities.__getitem__) for d in decisions]
        result = quality(
            np.array([_index(label) for label in best]),
            np.array([max(d.probabilities.values()) for d in decisions]),
            np.array([DOMAINS.index(domain) for domain, _ in asked]),
        )
        right = np.array([label == domain for label, (domain, _) in zip(best, asked, strict=True)])
        own = np.array([domain for domain, _ in asked])
        found |= {
            f"{name}accuracy": result.accuracy,
            f"{name}macro_f1": result.macro_f1,
            f"{name}ece": result.ece,
            f"{name}domains": {domain: float(right[own == domain].mean()) for domain in test},
        }
    return found


def scope(judge: Judge, test: Tests, corpus: Corpus) -> dict[str, Any]:
    """AUROC and FPR at 95 % TPR of the specialists' largest probability, against CLINC's queries."""
    outside = [_special(judge.decide(text)) for text in corpus.out_of_scope]
    found: dict[str, Any] = {}
    for name, form in (("", framed), ("bare_", bare)):
        inside = [_special(judge.decide(form(d, row))) for d in SPECIALISTS for row in test[d]]
        found[f"{name}out_of_scope_auroc"] = auroc(inside, outside)
        found[f"{name}out_of_scope_fpr95"] = float(np.mean(outside >= np.quantile(inside, 0.05)))
    found["out_of_scope_to_expert"] = float(
        np.mean([judge.decide(text).expert is not None for text in corpus.out_of_scope])
    )
    return found


def unseen(judge: Judge, test: Tests, name: str) -> float:
    """AUROC of known domains against one that the router was fitted without."""
    known = [d for d in SPECIALISTS if d != name]
    inside = [_special(judge.decide(row["prompt"])) for d in known for row in test[d]]
    outside = [_special(judge.decide(row["prompt"])) for row in test[name]]
    return auroc(inside, outside)


def shift(judge: Judge, asked: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Right, base and wrong expert; a name starts with its domain, "none" where no expert should."""
    outcomes = {}
    for name, texts in asked.items():
        experts = [judge.decide(text).expert for text in texts]
        own = None if name.startswith("none") else name.split()[0]
        outcomes[name] = {
            "right": float(np.mean([expert == own for expert in experts])),
            "base": float(np.mean([expert is None for expert in experts])),
            "wrong": float(np.mean([expert not in (own, None) for expert in experts])),
        }
    return outcomes


def conversations(
    judge: Judge, test: Tests, corpus: Corpus, rng: np.random.Generator
) -> dict[str, float]:
    """Follow-ups stay, switches go, and a follow-up after a switch stays with the new expert."""
    stays, goes, stays_after = [], [], []
    for name in SPECIALISTS:
        for row in test[name][:60]:
            reply = str(rng.choice(FOLLOW_UPS))
            stays.append(judge.decide(row["prompt"], reply).expert == name)
            other = str(rng.choice([d for d in SPECIALISTS if d != name]))
            second = test[other][int(rng.integers(len(test[other])))]["prompt"]
            goes.append(judge.decide(row["prompt"], second).expert == other)
            stays_after.append(judge.decide(row["prompt"], second, reply).expert == other)
    coffee = [judge.decide(*turns).expert is None for turns in corpus.coffee]
    return {
        "follow_ups_right": float(np.mean(stays)),
        "switches_right": float(np.mean(goes)),
        "follow_ups_after_switch_right": float(np.mean(stays_after)),
        "coffee_dialogues_to_base": float(np.mean(coffee)),
    }


def attacks(judge: Judge, test: Tests) -> dict[str, Any]:
    """Share of specialists' prompts that a prefix moves from their decision to another expert."""
    moved = {}
    for prefix, target in PREFIXES.items():
        texts = [row["prompt"] for d in SPECIALISTS if d != target for row in test[d][:150]]
        before = [judge.decide(text).expert for text in texts]
        after = [judge.decide(f"{prefix} {text}").expert for text in texts]
        changed = [b is not None and b != a for a, b in zip(before, after, strict=True)]
        moved[prefix[:40]] = float(np.mean(changed))
    return {"attacks": moved, "prefix_attack_moved": moved[THE_ATTACK]}


def latency(judge: Judge, corpus: Corpus) -> dict[str, float]:
    """CPU time of a decision on a 64-token prompt, tokenization excluded, in milliseconds."""
    texts = " ".join(row["prompt"] for row in corpus.test["math"][:200])
    ids = judge.encode(texts)
    router = judge.router
    times = []
    count = 2000 if router.config.features == "default" else 300
    for index in range(count):
        start = 64 * (index % (len(ids) // 64))
        prompt = ids[start : start + 64]
        before = time.thread_time_ns()
        router.decide_ids([prompt])
        times.append((time.thread_time_ns() - before) / 1e6)
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def residency(judge: Judge, test: Tests, rng: np.random.Generator) -> dict[str, Any]:
    """Swaps and accuracy of routing among two slots, by margin for an expert in a slot.

    Bare prompts of all specialists in random order, one at a time; the slot that was used least
    recently is given up.
    """
    asked = [(name, bare(name, row)) for name in SPECIALISTS for row in test[name][:100]]
    order = rng.permutation(len(asked))
    found: dict[str, Any] = {}
    for margin in (0.0, 0.5, 0.9, 0.95):
        slots: list[str] = []
        swaps = right = 0
        for index in order:
            name, text = asked[index]
            expert = judge.decide(text, resident=slots.__contains__, margin=margin).expert
            right += expert == name
            if expert is None:
                continue
            swaps += expert not in slots
            slots = [expert, *(other for other in slots if other != expert)][:SLOTS]
        found[str(margin)] = {"swaps": swaps, "right": right / len(asked)}
    return {"residency": found}


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Chance that a prompt in scope scores higher than one out of scope; ties count half."""
    scores = np.sort(np.asarray(outside))
    below = np.searchsorted(scores, inside, side="left")
    upto = np.searchsorted(scores, inside, side="right")
    return float((below + upto).mean() / 2 / len(scores))


def _special(decision: Decision) -> float:
    """Largest probability over the specialists."""
    return max(p for label, p in decision.probabilities.items() if label in SPECIALISTS)


def _index(label: str) -> int:
    return DOMAINS.index(label)
