"""Quality per byte: deltamux and the published delta compressors on the same experts.

    python -m benchmarks.make_experts --data DIR
    python -m benchmarks.peers.quality --data DIR [--only math sql] [--seeds 3] [--parts peers ours]

Every method compresses the linears of each expert's decoder from the same calibration text and is
measured on the same held-out text in float32. Bits count every byte of a linear: codes, scales,
indices. The embedding is compressed too in deltamux's rows; the peers keep the expert's own in 16 bit,
as they do as published, and its norms. A seed is a draw of the calibration text. Rows are kept in
--cache/quality.jsonl as they are measured, and what is there is not measured again.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from benchmarks.make_experts import CACHE, RUNS
from benchmarks.peers.bench import MAX_TOKENS, Bench, Row, open_bench
from benchmarks.peers.methods import PEERS, Matrix, dare, delta_come, low_rank
from benchmarks.peers.report import print_bars, print_means
from benchmarks.record import record
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.choose import choose
from deltamux.compression.choice.distil import Student, distil
from deltamux.compression.choice.measure import measure
from deltamux.compression.choice.tune import best_stretch
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.recipe import (
    AllocationRecipe,
    DistillationRecipe,
    Recipe,
)
from deltamux.compression.streaming.forward import WeightSource
from deltamux.compression.streaming.moments import second_moments

HEADLINE_BUDGETS = (2.1, 1.6, 1.05, 0.5)
LOWER_BUDGETS = (0.25, 0.1)
DISTILLED_BUDGETS = (0.25,)
DISTILLATION = DistillationRecipe(passes=6, learning_rate=0.03)
DISTILLATION_SAMPLES = 12
PEERS_AT_OTHER_BUDGETS = {
    "delta-come@0.5": delta_come(0.5),
    "low-rank@0.5": low_rank(0.5),
    "low-rank@2": low_rank(2.0),
    "dare-4@0.5": dare(0.97, 4),
}
DISTILLED_PEERS = ("bitdelta", "me-switch")
# Distillation takes longer than all the rest: it is measured where text is short.
DISTILLED_EXPERTS = ("sql", "shell")


def peers(bench: Bench) -> Iterator[Row]:
    """Every peer, from one calibration."""
    methods = PEERS | PEERS_AT_OTHER_BUDGETS
    deltas: dict[str, dict[str, torch.Tensor]] = {name: {} for name in methods}
    spent = dict.fromkeys(["calibrate", *methods], 0.0)
    num_bytes = dict.fromkeys(methods, 0)
    before = time.perf_counter()
    for layer, moments in second_moments(bench.expert, bench.calibration):
        spent["calibrate"] += time.perf_counter() - before
        for spec in bench.specs:
            if spec.layer != layer:
                continue
            matrix = Matrix(plain_delta(bench.difference, spec.name), moments[spec.name])
            for name, peer in methods.items():
                before = time.perf_counter()
                result = peer(matrix)
                spent[name] += time.perf_counter() - before
                deltas[name][spec.name] = result.delta_NK.to(torch.bfloat16)
                num_bytes[name] += result.num_bytes
        before = time.perf_counter()
    embedding = sum(bench.expert.load(n).nbytes for n in bench.expert.files if "embed" in n)
    for name in methods:
        student = peer_student(bench, deltas[name])
        seconds = spent["calibrate"] + spent[name]
        result = bench.reference.compare(student.scaled({}))
        yield bench.row(name, num_bytes[name], embedding, seconds, result)
        if name in DISTILLED_PEERS and bench.name in DISTILLED_EXPERTS:
            result, more = distilled(bench, student)
            yield bench.row(f"{name}+distil", num_bytes[name], embedding, seconds + more, result)
        deltas[name].clear()


def ours(bench: Bench) -> Iterator[Row]:
    """Every budget from one set of ladders, measured as it would be read back.

    The lower budgets, which only complete the curve, from the first draw alone.
    """
    before = time.perf_counter()
    budgets = HEADLINE_BUDGETS if bench.seed else HEADLINE_BUDGETS + LOWER_BUDGETS
    every_rung = Recipe(allocation=AllocationRecipe(bits=min(budgets)))
    work = bench.workspace(every_rung)
    ladders = measure(bench.difference, every_rung, bench.moments, work, progress=False)
    # Ladders that an earlier run measured took what they took then.
    took = work.root / "seconds.txt"
    if not took.exists():
        took.write_text(f"{time.perf_counter() - before:.1f}")
    seconds = float(took.read_text())
    for bits in budgets:
        before = time.perf_counter()
        recipe = Recipe(allocation=AllocationRecipe(bits=bits))
        candidates = bench.candidates(recipe, work, ladders)
        choice = choose(candidates)
        stretches = candidates.evenly(best_stretch(candidates, choice))
        sizes = bench.bytes_of(candidates, choice)
        spent = seconds + time.perf_counter() - before
        result = bench.reference.compare(candidates.weights(choice, stretches))
        name = f"deltamux@{bits:g}"
        yield bench.row(name, *sizes, spent, result)
        if bench.seed == 0 and bench.name in DISTILLED_EXPERTS and bits in DISTILLED_BUDGETS:
            result, more = distilled(bench, Student.of(candidates, choice))
            yield bench.row(f"{name}+distil", *sizes, spent + more, result)


def distilled(bench: Bench, student: Student) -> tuple[Evaluation, float]:
    """The student with learned steps, and the seconds that learning took."""
    before = time.perf_counter()
    samples = bench.calibration[-DISTILLATION_SAMPLES:]
    factors = distil(student, bench.expert, samples, DISTILLATION, progress=False)
    seconds = time.perf_counter() - before
    return bench.reference.compare(student.scaled(factors)), seconds


PARTS = {"peers": peers, "ours": ours}


def plain_delta(difference: Difference, name: str) -> torch.Tensor:
    """What the peers compress: the difference of the weights, norms aside."""
    return difference.expert.load(name).float() - difference.base.load(name).float()


def peer_student(bench: Bench, deltas: dict[str, torch.Tensor]) -> Student:
    """Base plus a peer's deltas in the linears, the expert's own tensors elsewhere."""
    base, expert = bench.difference.base, bench.expert

    def scaled(factors: dict[str, float]) -> WeightSource:
        def load(name: str) -> torch.Tensor:
            if name in deltas:
                return base.load(name).float() + deltas[name].float() * factors.get(name, 1.0)
            return expert.load(name)

        return load

    return Student(scaled, lambda name: deltas[name].float(), list(deltas))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decide what an expert is measured on."""
    parser.add_argument("--data", type=Path, required=True, help="DOMAIN/{train,test}.jsonl")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--rows", type=int, default=32, help="held-out rows an expert")
    parser.add_argument("--calibration", type=int, default=96, help="calibration rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    kept = arguments.cache / "quality.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["part"], row["expert"], row["seed"]) for row in rows}
    for name, seed, part in product(arguments.only, range(arguments.seeds), arguments.parts):
        # Peers are measured once: three draws are for the rows that are claimed.
        if (part, name, seed) in done or (part == "peers" and seed):
            continue
        found = []
        for row in PARTS[part](open_bench(arguments, name, seed)):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found.append({"part": part, **asdict(row), "peak_bytes": peak})
            result = row.evaluation
            print(
                f"{name} {seed} {row.method}: {row.bits_per_weight:.3f} bits, gain "
                f"{result.gain_kept:.2%}, KL {result.kl / result.kl_base:.4%}",
                flush=True,
            )
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
    print_means(rows)
    print_bars(rows)
    record("quality", {"settings": settings(arguments), "rows": rows})


def settings(arguments: argparse.Namespace) -> dict[str, object]:
    """What the rows were measured with."""
    return {
        "held_out_rows": arguments.rows,
        "calibration_rows": arguments.calibration,
        "max_tokens": MAX_TOKENS,
        "distillation": DISTILLATION.model_dump(),
        "distillation_rows": DISTILLATION_SAMPLES,
    }


if __name__ == "__main__":
    main()
