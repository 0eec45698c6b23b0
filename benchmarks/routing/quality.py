"""The router against its bars: accuracy, calibration, scope, shift, conversations, attacks, time.

python -m benchmarks.routing.quality --base .demo/base --data DATA [--shifted DIR]
                             [--features default encoder] [--seeds 3]

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
from typing import Any

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


def fitted(rows: Any, base: str, features: Any, seed: int, describe: bool = False) -> Judge:
    """A router fitted on rows, in a directory that lives as long as the judge."""
    folder = tempfile.TemporaryDirectory()
    directory = Path(folder.name) / "router"
    known = {name: text for name, text in DESCRIPTIONS.items() if describe and name in rows}
    start, cpu = time.perf_counter(), time.process_time()
    report = fit_router(
        dataset(rows), directory, base=base, features=features, seed=seed, descriptions=known
    )
    took = Took(time.perf_counter() - start, time.process_time() - cpu)
    return Judge(directory, report, took, folder)


def one_seed(corpus: Corpus, base: str, features: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    test = sample(corpus.test, 300, rng)
    judge = fitted(corpus.train, base, features, seed)
    found = held_out(judge, test) | scope(judge, test, corpus)
    found |= conversations(judge, test, corpus, rng) | attacks(judge, test)
    found |= latency(judge, corpus) | residency(judge, test, rng)
    found["fit_all_seconds"], found["fit_all_cpu_seconds"] = judge.took
    found["artifact_mb"] = judge.report.num_bytes / 1e6
    found["shifted_data_sets"] = shift(judge, corpus.shifted)
    few = sample(corpus.train, REFIT_PROMPTS // len(DOMAINS), rng)
    small = fitted(few, base, features, seed)
    found["refit_3000_seconds"], found["refit_3000_cpu_seconds"] = small.took
    found["accuracy_3000"] = held_out(small, test)["accuracy"]
    found["unseen_domains"] = {}
    for name in SPECIALISTS:
        others = {domain: rows[:200] for domain, rows in few.items() if domain != name}
        found["unseen_domains"][name] = unseen(fitted(others, base, features, seed), test, name)
    found["unseen_domain_auroc"] = float(np.mean(list(found["unseen_domains"].values())))
    found["shifted_styles"] = styles(corpus, base, features, seed)
    wrong = [
        part["wrong"] for part in (found["shifted_styles"] | found["shifted_data_sets"]).values()
    ]
    found["shifted_wrong_expert"] = float(np.mean(wrong))
    found["shifted_wrong_expert_worst"] = max(wrong)
    hundred = {name: rows[:100] for name, rows in test.items()}
    for count in FEW:
        handful = sample(corpus.train, count, np.random.default_rng([seed, count]))
        figures = held_out(fitted(handful, base, features, seed), hundred)
        found[f"bare_accuracy_{count}"] = figures["bare_accuracy"]
        found[f"accuracy_{count}"] = figures["accuracy"]
        if count == 16:
            described = held_out(fitted(handful, base, features, seed, describe=True), hundred)
            found["bare_accuracy_16_described"] = described["bare_accuracy"]
    return found


def styles(corpus: Corpus, base: str, features: str, seed: int) -> dict[str, dict[str, float]]:
    """Outcomes on the form of each domain that was left out of training."""
    rng = np.random.default_rng(seed)
    known = {
        name: [row for row in rows if name not in STYLES or not STYLES[name](row)]
        for name, rows in corpus.train.items()
    }
    judge = fitted(sample(known, 500, rng), base, features, seed)
    asked = {
        f"{name} style": [row["prompt"] for row in corpus.test[name] if form(row)][:300]
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
        bar, at_most = bars[features == "encoder"], bars[2]
        value = figures[name]
        held = value <= bar if at_most else value >= bar
        rows.append(
            (name, f"{'≤' if at_most else '≥'} {bar:g}", f"{value:.4f}", "yes" if held else "NO")
        )
    print(f"\nfeatures {features}")
    print(table(("figure", "bar", "measured", "holds"), rows))
    for name in ("domains", "bare_domains", "shifted_styles", "shifted_data_sets", "unseen_domains",
                 "attacks", "residency"):  # fmt: skip
        print(name, figures[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=".demo/base")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shifted", type=Path)
    parser.add_argument("--features", nargs="+", default=["default", "encoder"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.data, arguments.shifted)
    result: dict[str, Any] = {"bars": BARS, "load_at_start": os.getloadavg()[0]}
    for features in arguments.features:
        figures: list[Any] = []
        for seed in range(arguments.seeds):
            figures.append(one_seed(corpus, arguments.base, features, seed))
            # An hour of work on a slow machine: what is done is kept.
            result[features] = mean(figures) | {"seeds": list(figures)}
            keep("routing", result)
        show(features, result[features])
    record("routing", result)


if __name__ == "__main__":
    main()
