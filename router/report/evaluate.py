"""How a router does on labelled prompts it was not fitted on.

For each domain three counts that mean different things to a user: answered by the right expert
(or rightly by the base), by the base although an expert exists (safe), or by a wrong expert (not
safe). A domain that the router does not know is out of scope: right is what the base answers.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
from tqdm import tqdm

from deltamux.router.decide.artifact import Fingerprints
from deltamux.router.decide.decision import BASE_NAME, Decision
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Encode
from deltamux.router.fit.data import Dataset, fingerprints
from deltamux.router.fit.metrics import Quality, quality
from deltamux.router.report.curves import Curves, reliability, risk_coverage

RIGHT: Final = "right"
FALLBACK: Final = "fallback"
WRONG: Final = "wrong"
# Row of the confusion matrix for domains that the router does not know.
OTHER: Final = "other domains"


@dataclass(frozen=True)
class DomainCounts:
    """Outcomes of one domain's prompts; `known` is False for a domain without a label."""

    known: bool
    n: int
    right: int
    fallback: int
    wrong: int


@dataclass(frozen=True)
class Evaluation:
    """The result.

    Attributes:
        quality: Of the most probable domain, before abstaining; prompts of known domains only.
        domains: Outcomes by domain.
        seen: Prompts that the router was trained on; None where its training prompts are unknown.
        curves: Confusion, reliability, risk against coverage.
        decision_p50_us: Median time of a decision in microseconds, tokenization excluded.
        decision_p99_us: Its 99th percentile.
    """

    quality: Quality | None
    domains: dict[str, DomainCounts]
    seen: int | None
    curves: Curves
    decision_p50_us: float
    decision_p99_us: float


def evaluate_router(
    router: Router,
    encode: Encode,
    dataset: Dataset,
    *,
    seen: Fingerprints | None = None,
    progress: bool = False,
) -> Evaluation:
    """Route every prompt and count.

    Args:
        router: The router to judge.
        encode: Its tokenizer.
        dataset: Labelled prompts.
        seen: Fingerprints of the router's training prompts, to find leakage; None: unknown.
        progress: Show a bar.
    """
    decisions: list[Decision] = []
    nanoseconds: list[int] = []
    for prompt in tqdm(dataset.prompts, desc="evaluate", disable=not progress, leave=False):
        conversation = router.read(prompt.turns, encode)
        start = time.perf_counter_ns()
        decisions.append(router.decide_read(conversation))
        nanoseconds.append(time.perf_counter_ns() - start)
    domains = [prompt.domain for prompt in dataset.prompts]
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1000
    return Evaluation(
        quality=_quality(router, decisions, domains),
        domains=_count(router, decisions, domains),
        seen=_leaked(dataset, seen),
        curves=_curves(router, decisions, domains),
        decision_p50_us=round(float(p50), 1),
        decision_p99_us=round(float(p99), 1),
    )


def _quality(router: Router, decisions: list[Decision], domains: list[str]) -> Quality | None:
    """Quality over prompts of known domains, None without any."""
    known = [(made, name) for made, name in zip(decisions, domains, strict=True)]
    known = [(made, name) for made, name in known if name in router.labels]
    if not known:
        return None
    index = router.labels.index
    return quality(
        np.array([index(made.domain) for made, _ in known], dtype=np.int64),
        np.array([made.confidence for made, _ in known]),
        np.array([index(name) for _, name in known], dtype=np.int64),
    )


def _leaked(dataset: Dataset, seen: Fingerprints | None) -> int | None:
    """Prompts that were trained on."""
    if seen is None or not seen.size:
        return None
    return int(np.isin(fingerprints(dataset.prompts), seen).sum())


def _curves(router: Router, decisions: list[Decision], domains: list[str]) -> Curves:
    """Confusion by who answers; reliability and risk by probabilities, before abstaining."""
    labels, experts = router.labels, router.config.experts
    rows = [*labels, OTHER] if set(domains) - set(labels) else labels
    answers = [*sorted({name for name in experts.values() if name is not None}), BASE_NAME]
    confusion = [[0] * len(answers) for _ in rows]
    for made, domain in zip(decisions, domains, strict=True):
        row = rows.index(domain if domain in labels else OTHER)
        confusion[row][answers.index(made.expert or BASE_NAME)] += 1
    probabilities = np.array([list(made.probabilities.values()) for made in decisions])
    truth = np.array([labels.index(d) if d in labels else -1 for d in domains], dtype=np.int64)
    best, known = probabilities.argmax(axis=1), truth >= 0
    specialists = np.array([experts[label] is not None for label in labels], dtype=np.bool_)
    return Curves(
        labels=rows,
        answers=answers,
        confusion=confusion,
        reliability=reliability(probabilities.max(axis=1)[known], (best == truth)[known]),
        risk_coverage=risk_coverage(probabilities, truth, specialists),
        threshold=router.config.threshold,
    )


def _count(
    router: Router, decisions: list[Decision], domains: list[str]
) -> dict[str, DomainCounts]:
    """Outcomes by domain, sorted."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for made, domain in zip(decisions, domains, strict=True):
        outcomes[domain, _outcome(made.expert, router.config.experts.get(domain))] += 1
    return {
        domain: DomainCounts(
            known=domain in router.labels,
            n=sum(outcomes[domain, kind] for kind in (RIGHT, FALLBACK, WRONG)),
            right=outcomes[domain, RIGHT],
            fallback=outcomes[domain, FALLBACK],
            wrong=outcomes[domain, WRONG],
        )
        for domain in sorted(set(domains))
    }


def _outcome(got: str | None, wanted: str | None) -> str:
    """Right, fallback or wrong, by who answers (None is the base)."""
    if got == wanted:
        return RIGHT
    return FALLBACK if got is None else WRONG
