"""The router against its bars: accuracy, calibration, scope, shift, conversations, attacks, time.

python -m benchmarks.routing.quality --base .demo/base --data DATA [--shifted DIR]
                             [--features default encoder] [--seeds 3] [--quick]

Every figure is the mean over the seeds; a seed draws the training subsets, the folds and 300 test
prompts of each domain. Accuracy, macro-F1 and ECE are of the most probable domain; "wrong expert",
follow-ups, switches and attacks are of decisions, abstaining included. Times are CPU seconds, which
another load on the machine lengthens less than those of the clock; of fits both are kept.
`data.py` says what is trained on and how each test is made. Prints a table and keeps the
figures in `results/`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import keep, record
from benchmarks.routing.data import (
    DESCRIPTIONS,
    DOMAINS,
    SPECIALISTS,
    STYLES,
    Corpus,
    dataset,
    read_corpus,
    sample,
)
from benchmarks.routing.measure import (
    Judge,
    Tests,
    Took,
    attacks,
    conversations,
    held_out,
    latency,
    residency,
    scope,
    shift,
    unseen,
)
from deltamux.router.console import table
from deltamux.router.fit.fit import fit_router
from deltamux.router.fit.options import Options

# Name, bar with default features, bar with the encoder, and whether a figure may not exceed it.
BARS: dict[str, tuple[float, float, bool]] = {
    "accuracy": (0.990, 0.990, False),
    "macro_f1": (0.990, 0.990, False),
    "bare_accuracy": (0.978, 0.980, False),
    "ece": (0.008, 0.006, True),
    "out_of_scope_auroc": (0.955, 0.970, False),
    "out_of_scope_fpr95": (0.20, 0.13, True),
    "unseen_domain_auroc": (0.98, 0.99, False),
    "shifted_wrong_expert": (0.08, 0.05, True),
    "follow_ups_right": (0.90, 0.93, False),
    "switches_right": (0.93, 0.95, False),
    "bare_accuracy_16": (0.90, 0.93, False),
    "prefix_attack_moved": (0.08, 0.08, True),
    "p50_ms": (0.1, 8.0, True),
    "p99_ms": (0.4, 20.0, True),
    "artifact_mb": (8.0, 8.0, True),
    "refit_3000_cpu_seconds": (15.0, 60.0, True),
}
REFIT_PROMPTS = 3000
FEW = (8, 16, 32, 64, 128)


class Run(NamedTuple):
    """What a seed's figures are of."""

    corpus: Corpus
    base: str
    features: Any
    seed: int


def fitted(rows: Any, run: Run, describe: bool = False) -> Judge:
    """A router fitted on rows, in a directory that lives as long as the judge."""
    base, features, seed = run.base, run.features, run.seed
    folder = tempfile.TemporaryDirectory()
    directory = Path(folder.name) / "router"
    known = {name: text for name, text in DESCRIPTIONS.items() if describe and name in rows}
    start, cpu = time.perf_counter(), time.process_time()
    options = Options(features=features, seed=seed, descriptions=known)
    report = fit_router(dataset(rows), directory, options, base=base)
    took = Took(time.perf_counter() - start, time.process_time() - cpu)
    return Judge(directory, report, took, folder)


def one_seed(run: Run, quick: bool) -> dict[str, Any]:
    """Every figure of one seed; quick leaves out those that need fits without a domain or a form."""
    rng = np.random.default_rng(run.seed)
    test = sample(run.corpus.test, 300, rng)
    judge = fitted(run.corpus.train, run)
    found = held_out(judge, test) | scope(judge, test, run.corpus)
    found |= conversations(judge, test, run.corpus, rng) | attacks(judge, test)
    found |= latency(judge, run.corpus) | residency(judge, test, rng)
    found["fit_all_seconds"], found["fit_all_cpu_seconds"] = judge.took
    found["artifact_mb"] = judge.report.num_bytes / 1e6
    found["shifted_data_sets"] = shift(judge, run.corpus.shifted)
    found |= few_prompts(run, test, (16,) if quick else FEW)
    return found if quick else found | unseen_kinds(run, found, test)


def unseen_kinds(run: Run, found: dict[str, Any], test: Tests) -> dict[str, Any]:
    """Figures of fits on fewer rows, without a domain, and without a form of each domain."""
    few = sample(run.corpus.train, REFIT_PROMPTS // len(DOMAINS), np.random.default_rng(run.seed))
    small = fitted(few, run)
    domains = {}
    for name in SPECIALISTS:
        others = {domain: rows[:200] for domain, rows in few.items() if domain != name}
        domains[name] = unseen(fitted(others, run), test, name)
    forms = styles(run)
    wrong = [part["wrong"] for part in (forms | found["shifted_data_sets"]).values()]
    return {
        "refit_3000_seconds": small.took.seconds,
        "refit_3000_cpu_seconds": small.took.cpu_seconds,
        "accuracy_3000": held_out(small, test)["accuracy"],
        "unseen_domains": domains,
        "unseen_domain_auroc": float(np.mean(list(domains.values()))),
        "shifted_styles": forms,
        "shifted_wrong_expert": float(np.mean(wrong)),
        "shifted_wrong_expert_worst": max(wrong),
    }


def few_prompts(run: Run, test: Tests, counts: tuple[int, ...]) -> dict[str, Any]:
    """Accuracy of routers that were fitted on a few prompts of each domain."""
    hundred = {name: rows[:100] for name, rows in test.items()}
    found: dict[str, Any] = {}
    for count in counts:
        handful = sample(run.corpus.train, count, np.random.default_rng([run.seed, count]))
        figures = held_out(fitted(handful, run), hundred)
        found[f"bare_accuracy_{count}"] = figures["bare_accuracy"]
        found[f"accuracy_{count}"] = figures["accuracy"]
        if count == 16:
            described = held_out(fitted(handful, run, describe=True), hundred)
            found["bare_accuracy_16_described"] = described["bare_accuracy"]
    return found


def styles(run: Run) -> dict[str, dict[str, float]]:
    """Outcomes on the form of each domain that was left out of training."""
    rng = np.random.default_rng(run.seed)
    known = {
        name: [row for row in rows if name not in STYLES or not STYLES[name](row)]
        for name, rows in run.corpus.train.items()
    }
    judge = fitted(sample(known, 500, rng), run)
    asked = {
        f"{name} style": [row["prompt"] for row in run.corpus.test[name] if form(row)][:300]
        for name, form in STYLES.items()
    }
    return shift(judge, asked)


def mean(figures: list[Any]) -> Any:
    """The mean of equal structures of numbers."""
    if isinstance(figures[0], dict):
        return {key: mean([figure[key] for figure in figures]) for key in figures[0]}
    if isinstance(figures[0], list):
        return [mean(list(column)) for column in zip(*figures, strict=True)]
    return round(float(np.mean(figures)), 5)


def show(features: str, figures: dict[str, Any]) -> None:
    rows = []
    for name, bars in BARS.items():
        if name not in figures:
            continue
        bar, at_most = bars[features == "encoder"], bars[2]
        value = figures[name]
        held = value <= bar if at_most else value >= bar
        rows.append(
            (name, f"{'≤' if at_most else '≥'} {bar:g}", f"{value:.4f}", "yes" if held else "NO")
        )
    print(f"\nfeatures {features}")
    print(table(("figure", "bar", "measured", "holds"), rows))
    for name, value in figures.items():
        if isinstance(value, dict):
            print(name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=".demo/base")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shifted", type=Path)
    parser.add_argument("--features", nargs="+", default=["default", "encoder"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="without unseen domains and forms")
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.data, arguments.shifted)
    result: dict[str, Any] = {"bars": BARS, "load_at_start": os.getloadavg()[0]}
    for features in arguments.features:
        figures: list[Any] = []
        for seed in range(arguments.seeds):
            figures.append(one_seed(Run(corpus, arguments.base, features, seed), arguments.quick))
            # An hour of work on a slow machine: what is done is kept.
            result[features] = mean(figures) | {"seeds": list(figures)}
            keep("routing", result)
        show(features, result[features])
    record("routing", result)


if __name__ == "__main__":
    main()
