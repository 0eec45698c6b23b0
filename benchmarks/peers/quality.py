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
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch

from benchmarks.make_experts import CACHE, RUNS
from benchmarks.peers.methods import PEERS, Matrix, dare, delta_come, low_rank
from benchmarks.peers.report import print_bars, print_means
from benchmarks.record import record
from deltamux.compression.artifact.write import linear_weights
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.checkpoint import Checkpoint, open_checkpoint
from deltamux.compression.checkpoint.delta import Difference, compare
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.choose import choose
from deltamux.compression.choice.distil import Student, distil
from deltamux.compression.choice.fixed import fixed_weights
from deltamux.compression.choice.measure import measure, measure_key
from deltamux.compression.choice.problem import Choice
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.tune import best_stretch
from deltamux.compression.choice.workspace import Ladder, Workspace
from deltamux.compression.evaluate import Evaluation, Reference
from deltamux.compression.recipe import (
    AllocationRecipe,
    DistillationRecipe,
    Recipe,
)
from deltamux.compression.streaming.forward import WeightSource
from deltamux.compression.streaming.moments import InputMoments, second_moments
from deltamux.compression.streaming.rows import read_rows
from deltamux.compression.streaming.text import Sample, encode_rows

HEADLINE_BUDGETS = (2.1, 1.6, 1.05, 0.5)
LOWER_BUDGETS = (0.25, 0.1)
DISTILLED_BUDGETS = (0.25,)
DISTILLATION = DistillationRecipe(passes=6, learning_rate=0.03)
DISTILLATION_SAMPLES = 12
MAX_TOKENS = 256
PEERS_AT_OTHER_BUDGETS = {
    "delta-come@0.5": delta_come(0.5),
    "low-rank@0.5": low_rank(0.5),
    "low-rank@2": low_rank(2.0),
    "dare-4@0.5": dare(0.97, 4),
}
DISTILLED_PEERS = ("bitdelta", "me-switch")
# Distillation takes longer than all the rest: it is measured where text is short.
DISTILLED_EXPERTS = ("sql", "shell")


@dataclass(frozen=True)
class Row:
    """One method on one expert."""

    expert: str
    seed: int
    method: str
    bits_per_weight: float
    linear_bytes: int
    embedding_bytes: int
    seconds: float
    evaluation: Evaluation


@dataclass
class Bench:
    """An expert with its text, and the rows measured so far."""

    name: str
    seed: int
    difference: Difference
    calibration: list[Sample]
    reference: Reference
    cache: Path

    @property
    def expert(self) -> Checkpoint:
        """The expert's checkpoint."""
        return self.difference.expert

    @property
    def moments(self) -> InputMoments:
        """Second moments of the linears' inputs."""
        return InputMoments(self.expert, self.calibration)

    @property
    def specs(self) -> list[TensorSpec]:
        """The decoder's linears."""
        return [spec for spec in self.difference.specs if spec.role is Role.LINEAR]

    def workspace(self, recipe: Recipe) -> Workspace:
        """Where ladders of this expert and seed are kept."""
        key = measure_key(self.difference, recipe, self.calibration)
        pruning = recipe.linear.pruning
        kind = "" if recipe.measures_low_rank else "-full-rank"
        if pruning:
            kind = f"-{pruning.score.value}-{pruning.pattern.value}"
        return Workspace(self.cache / f"ladders-{self.name}-{self.seed}{kind}", key)

    def candidates(self, recipe: Recipe, work: Workspace, ladders: list[Ladder]) -> Candidates:
        """The ladders, to be chosen from."""
        task = Task.of(self.difference, recipe, self.calibration, held_out=[], progress=False)
        return Candidates(task, work, ladders, fixed_weights(self.difference, recipe.embedding))

    def bytes_of(self, candidates: Candidates, choice: Choice) -> tuple[int, int]:
        """What a choice takes for the linears, and for the rest."""
        linears, rest = 0, 0
        for weight in candidates.encoded(choice):
            if weight.entry.role is Role.LINEAR:
                linears += weight.entry.bytes
            else:
                rest += weight.entry.bytes
        return linears, rest

    def row(
        self, method: str, num_bytes: int, embedding: int, seconds: float, result: Evaluation
    ) -> Row:
        """A row of this expert."""
        bits = num_bytes * 8 / linear_weights(self.difference)
        return Row(self.name, self.seed, method, bits, num_bytes, embedding, seconds, result)


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


def open_bench(arguments: argparse.Namespace, name: str, seed: int) -> Bench:
    """An expert with its calibration text (a draw of the training rows) and held-out text."""
    cache, domain = arguments.cache, arguments.data / RUNS[name].domain
    difference, reference = opened(cache, name, domain / "test.jsonl", arguments.rows)
    train = read_rows(domain / "train.jsonl")
    drawn = random.Random(seed).sample(train, min(arguments.calibration, len(train)))
    return Bench(
        name=name,
        seed=seed,
        difference=difference,
        calibration=encode_rows(drawn, difference.expert.root, MAX_TOKENS),
        reference=reference,
        cache=cache,
    )


@lru_cache(maxsize=1)
def opened(cache: Path, name: str, test: Path, rows: int) -> tuple[Difference, Reference]:
    """What an expert's draws share."""
    base, expert = open_checkpoint(cache / "base"), open_checkpoint(cache / name)
    held_out = encode_rows(read_rows(test)[:rows], expert.root, MAX_TOKENS)
    return compare(base, expert), Reference(base, expert, held_out, progress=False)


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
