"""Ways to share out bytes, and ways to prune, at one budget on one expert.

    python -m benchmarks.allocators.compare --data DIR [--expert sql] [--bits 0.5] [--measured]

Every allocation method chooses among the same entropy-coded rungs; every pruned ladder (a score, a
pattern) is measured anew and shared out by the default method. --measured lets the searches that can minimise the measured
divergence on calibration text instead of the predicted loss do so.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain

from benchmarks.make_experts import RUNS
from benchmarks.peers.bench import Bench, open_bench
from benchmarks.peers.quality import add_arguments
from benchmarks.record import keep, record
from deltamux.compression.artifact.write import linear_weights
from deltamux.compression.choice.choose import importances, rate_curves
from deltamux.compression.choice.evolution import evolve
from deltamux.compression.choice.measure import measure
from deltamux.compression.choice.methods import ALLOCATORS, Allocator, allocate
from deltamux.compression.choice.problem import Choice
from deltamux.compression.choice.tune import best_stretch
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.pruning.scores import Pattern, Score
from deltamux.compression.recipe import (
    EmbeddingRecipe,
    Importance,
    LinearRecipe,
    PruningRecipe,
    Recipe,
)

PRUNED = [
    (Score.MAGNITUDE, Pattern.UNSTRUCTURED),
    (Score.WANDA, Pattern.UNSTRUCTURED),
    (Score.SPARSEGPT, Pattern.UNSTRUCTURED),
    (Score.SPARSEGPT, Pattern.N_M),
    (Score.SPARSEGPT, Pattern.BLOCKS),
    (Score.SPARSEGPT, Pattern.STRUCTURED),
]
# A measured search costs an evaluation for every candidate: a small one.
SMALL_SEARCH = partial(evolve, population=4, generations=4)


class Trial:
    """Choices of rungs, stretched and compared with the expert."""

    def __init__(self, bench: Bench, recipe: Recipe) -> None:
        self.bench = bench
        work = bench.workspace(recipe)
        ladders = measure(bench.difference, recipe, bench.moments, work, progress=False)
        self.candidates = bench.candidates(recipe, work, ladders)

    def divergence(self, choice: Choice) -> float:
        """On calibration text, before the stretch."""
        return self.candidates.divergence(choice, 1.0)

    def held_out(self, choice: Choice) -> tuple[Evaluation, float]:
        """The comparison on held-out text, and the bits per linear weight."""
        stretches = self.candidates.evenly(best_stretch(self.candidates, choice))
        linear_bytes, _ = self.bench.bytes_of(self.candidates, choice)
        bits = linear_bytes * 8 / linear_weights(self.bench.difference)
        return self.bench.reference.compare(self.candidates.weights(choice, stretches)), bits


def allocations(bench: Bench, bits: float, searched: bool) -> Iterator[dict]:
    """Every method and importance on the same rungs."""
    trial = Trial(bench, Recipe(embedding=EmbeddingRecipe()))
    plans: list[tuple[str, str | Allocator, Importance]] = [
        (method, method, Importance.WEIGHTS) for method in ALLOCATORS
    ]
    plans += [(f"knapsack, {kind}", "knapsack", kind) for kind in Importance if kind != "weights"]
    for label, method, kind in plans:
        before = time.perf_counter()
        costs = importances(kind, trial.candidates.ladders, bench.expert, bench.calibration)
        curves = rate_curves(trial.candidates.ladders, costs)
        budget = int(bits * linear_weights(bench.difference) / 8)
        yield row(label, trial, allocate(method, curves, budget), before)
        if searched and method in ("atp", "knapsack-atp", "evolution"):
            before = time.perf_counter()
            chosen = SMALL_SEARCH if method == "evolution" else method
            choice = allocate(chosen, curves, budget, trial.divergence)
            yield row(f"{label}, measured", trial, choice, before)


def prunings(bench: Bench, bits: float) -> Iterator[dict]:
    """Every pruned ladder under the default allocation."""
    for score, pattern in PRUNED:
        before = time.perf_counter()
        pruning = PruningRecipe(score=score, pattern=pattern)
        linear = LinearRecipe(pruning=pruning)
        trial = Trial(bench, Recipe(linear=linear, embedding=EmbeddingRecipe()))
        costs = importances(
            Importance.WEIGHTS, trial.candidates.ladders, bench.expert, bench.calibration
        )
        budget = int(bits * linear_weights(bench.difference) / 8)
        choice = allocate("knapsack", rate_curves(trial.candidates.ladders, costs), budget)
        yield row(f"{score.value} {pattern.value}", trial, choice, before)


def row(label: str, trial: Trial, choice: Choice, started: float) -> dict:
    seconds = time.perf_counter() - started
    result, bits = trial.held_out(choice)
    print(
        f"{label:<28}{bits:>7.3f}{result.gain_kept:>9.2%}{result.kl / result.kl_base:>9.3%}"
        f"{result.top1_agreement:>8.2%}{seconds:>7.0f}",
        flush=True,
    )
    return {"method": label, "bits": bits, "seconds": seconds, "evaluation": asdict(result)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--expert", choices=RUNS, default="sql")
    parser.add_argument("--bits", type=float, default=0.5)
    parser.add_argument("--measured", action="store_true")
    arguments = parser.parse_args()
    bench = open_bench(arguments, arguments.expert, seed=0)
    print(f"{'method':<28}{'bits':>7}{'gain':>9}{'KL/base':>9}{'top-1':>8}{'s':>7}")
    rows: list[dict] = []
    result = {"expert": arguments.expert, "bits": arguments.bits, "rows": rows}
    found = allocations(bench, arguments.bits, arguments.measured)
    for each in chain(found, prunings(bench, arguments.bits)):
        rows.append(each)
        # Every pruned ladder takes minutes: what is done is kept.
        keep("allocation", result)
    record("allocation", result)


if __name__ == "__main__":
    main()
