"""Quality per byte: deltamux and the published delta compressors on the same experts.

    python benchmarks/make_experts.py --data DIR
    python benchmarks/quality.py --data DIR [--only math sql] [--seeds 3]

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
from pathlib import Path

import torch
from make_experts import CACHE, RUNS
from peers import PEERS, Matrix, dare, delta_come, low_rank
from record import record

from deltamux.compression.allocate import Choice
from deltamux.compression.architecture import Role, TensorSpec
from deltamux.compression.artifact import Artifact
from deltamux.compression.budget import choose_family, importances
from deltamux.compression.calibrate import second_moments
from deltamux.compression.checkpoint import Checkpoint, open_checkpoint
from deltamux.compression.compress import TRIAL_SAMPLES
from deltamux.compression.diff import Difference, compare
from deltamux.compression.distil import Student, distil
from deltamux.compression.evaluate import Evaluation, Reference
from deltamux.compression.measure import measure_key, measure_layer
from deltamux.compression.recipe import (
    AllocationRecipe,
    DistillationRecipe,
    EmbeddingRecipe,
    Recipe,
)
from deltamux.compression.reconstruct import reconstructed
from deltamux.compression.text import Sample, encode_rows, read_rows
from deltamux.compression.workspace import Workspace
from deltamux.compression.write import Draft, fixed_part, linear_weights, write_artifact

BUDGETS = (2.1, 1.6, 1.05, 0.5, 0.25, 0.1)
DISTILLED_BUDGETS = (0.25,)
DISTILLATION = DistillationRecipe(steps=6, learning_rate=0.03)
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
    def specs(self) -> list[TensorSpec]:
        """The decoder's linears."""
        return [spec for spec in self.difference.specs if spec.role is Role.LINEAR]

    def workspace(self, recipe: Recipe) -> Workspace:
        """Where ladders of this expert and seed are kept."""
        key = measure_key(self.difference, recipe, self.calibration)
        pruning = recipe.linear.pruning
        kind = f"-{pruning.score.value}-{pruning.pattern.value}" if pruning else ""
        return Workspace(self.cache / f"ladders-{self.name}-{self.seed}{kind}", key)

    def row(
        self, method: str, num_bytes: int, embedding: int, seconds: float, result: Evaluation
    ) -> Row:
        """A row of this expert."""
        bits = num_bytes * 8 / linear_weights(self.difference)
        return Row(self.name, self.seed, method, bits, num_bytes, embedding, seconds, result)


def measure_all(bench: Bench, with_peers: bool) -> Iterator[Row]:
    """One calibration for every method."""
    recipe = Recipe(allocation=AllocationRecipe(bits=min(BUDGETS)))  # every kind of rung
    work = bench.workspace(recipe)
    peers = PEERS | PEERS_AT_OTHER_BUDGETS if with_peers else {}
    deltas: dict[str, dict[str, torch.Tensor]] = {name: {} for name in peers}
    spent = dict.fromkeys(["calibrate", "deltamux", *peers], 0.0)
    num_bytes = dict.fromkeys(peers, 0)
    before = time.perf_counter()
    for layer, moments in second_moments(bench.expert, bench.calibration):
        spent["calibrate"] += time.perf_counter() - before
        specs = [spec for spec in bench.specs if spec.layer == layer]
        before = time.perf_counter()
        if not work.has(layer):
            measure_layer(bench.difference, recipe, specs, moments, work)
        spent["deltamux"] += time.perf_counter() - before
        for spec in specs:
            matrix = Matrix(plain_delta(bench.difference, spec.name), moments[spec.name])
            for name, peer in peers.items():
                before = time.perf_counter()
                result = peer(matrix)
                spent[name] += time.perf_counter() - before
                deltas[name][spec.name] = result.delta_NK.to(torch.bfloat16)
                num_bytes[name] += result.num_bytes
        before = time.perf_counter()
    yield from ours(bench, work, spent["calibrate"] + spent["deltamux"])
    embedding = sum(bench.expert.load(n).nbytes for n in bench.expert.files if "embed" in n)
    for name in peers:
        student = peer_student(bench, deltas[name])
        seconds = spent["calibrate"] + spent[name]
        result = bench.reference.compare(student.load)
        yield bench.row(name, num_bytes[name], embedding, seconds, result)
        if name in DISTILLED_PEERS and bench.name in DISTILLED_EXPERTS:
            before = time.perf_counter()
            factors = distil(
                student,
                bench.expert,
                bench.calibration[-DISTILLATION_SAMPLES:],
                DISTILLATION,
                False,
            )
            seconds += time.perf_counter() - before
            result = bench.reference.compare(student.scaled(factors))
            yield bench.row(f"{name}+distil", num_bytes[name], embedding, seconds, result)
        deltas[name].clear()


def ours(bench: Bench, work: Workspace, seconds: float) -> Iterator[Row]:
    """Every budget from one set of ladders; the artifact is written, read back and measured."""
    measured = [matrix for layer in range(_num_layers(bench)) for matrix in work.measured(layer)]
    difference = bench.difference
    trial = Reference(
        difference.base, bench.expert, bench.calibration[-TRIAL_SAMPLES:], progress=False
    )
    target = bench.cache / f"artifact-{bench.name}"
    target.mkdir(exist_ok=True)
    for bits in BUDGETS:
        allocation = AllocationRecipe(bits=bits)
        recipe = Recipe(
            allocation=allocation, embedding=EmbeddingRecipe(step=2.0 if bits < 1 else 1.0)
        )
        fixed = fixed_part(difference, recipe.embedding)
        costs = importances(allocation.importance, measured, bench.expert, bench.calibration)

        def divergence(choice: Choice, recipe: Recipe = recipe, fixed: Draft = fixed) -> float:
            draft = fixed.with_linears(work, measured, choice, {})
            write_artifact(difference, recipe, draft, target)
            return trial.compare(reconstructed(Artifact(target), difference.base)).kl

        choice = choose_family(
            allocation,
            difference,
            measured,
            costs,
            fixed,
            attempt=lambda _choice: None,
            divergence=divergence,
        )
        write_artifact(difference, recipe, fixed.with_linears(work, measured, choice, {}), target)
        artifact = Artifact(target)
        totals = artifact.manifest.totals
        result = bench.reference.compare(reconstructed(artifact, difference.base))
        name = f"deltamux@{bits:g}"
        yield bench.row(name, totals.linear_bytes, totals.embedding_bytes, seconds, result)
        distilled = bench.seed == 0 and bench.name in DISTILLED_EXPERTS
        if distilled and bits in DISTILLED_BUDGETS:
            before = time.perf_counter()
            student = Student.of(artifact, difference.base)
            samples = bench.calibration[-DISTILLATION_SAMPLES:]
            factors = distil(student, bench.expert, samples, DISTILLATION, False)
            longer = seconds + time.perf_counter() - before
            result = bench.reference.compare(student.scaled(factors))
            yield bench.row(
                f"{name}+distil", totals.linear_bytes, totals.embedding_bytes, longer, result
            )


def plain_delta(difference: Difference, name: str) -> torch.Tensor:
    """What the peers compress: the difference of the weights, norms aside."""
    return difference.expert.load(name).float() - difference.base.load(name).float()


def peer_student(bench: Bench, deltas: dict[str, torch.Tensor]) -> Student:
    """Base plus a peer's deltas in the linears, the expert's own tensors elsewhere."""
    base, expert = bench.difference.base, bench.expert

    def load(name: str) -> torch.Tensor:
        if name in deltas:
            return base.load(name).float() + deltas[name].float()
        return expert.load(name)

    return Student(load, lambda name: deltas[name].float(), list(deltas))


def open_bench(arguments: argparse.Namespace, name: str, seed: int) -> Bench:
    """An expert with its calibration text (a draw of the training rows) and held-out text."""
    cache, rows = arguments.cache, arguments.rows
    base, expert = open_checkpoint(cache / "base"), open_checkpoint(cache / name)
    domain = arguments.data / RUNS[name].domain
    train = read_rows(domain / "train.jsonl")
    drawn = random.Random(seed).sample(train, min(arguments.calibration, len(train)))
    held_out = encode_rows(read_rows(domain / "test.jsonl")[:rows], expert.root, MAX_TOKENS)
    return Bench(
        name=name,
        seed=seed,
        difference=compare(base, expert),
        calibration=encode_rows(drawn, expert.root, MAX_TOKENS),
        reference=Reference(base, expert, held_out, progress=False),
        cache=cache,
    )


def _num_layers(bench: Bench) -> int:
    return int(bench.expert.config["num_hidden_layers"])


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
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    kept = arguments.cache / "quality.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["expert"], row["seed"]) for row in rows if row["method"] == "end"}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if (name, seed) in done:
                continue
            bench = open_bench(arguments, name, seed)
            found = [asdict(row) for row in measure_all(bench, with_peers=seed == 0)]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found.append({"expert": name, "seed": seed, "method": "end", "peak_bytes": peak})
            with kept.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            rows += found
            print(f"{name} seed {seed}: {len(found) - 1} rows", flush=True)
    rows = [row for row in rows if row["method"] != "end"]
    print_table(rows)
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


def print_table(rows: list[dict]) -> None:
    """Means over experts and seeds, most bits first."""
    methods: dict[str, list[dict]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)

    def mean(group: list[dict], key: str) -> float:
        values = [row.get(key, row["evaluation"].get(key)) for row in group]
        return sum(values) / len(values)

    print(f"{'method':<20}{'bits':>7}{'gain':>9}{'KL/base':>9}{'top-1':>8}{'exact':>7}{'s':>6}")
    ordered = sorted(methods.items(), key=lambda item: -mean(item[1], "bits_per_weight"))
    for method, group in ordered:
        relative = [r["evaluation"]["kl"] / r["evaluation"]["kl_base"] for r in group]
        print(
            f"{method:<20}{mean(group, 'bits_per_weight'):>7.3f}{mean(group, 'gain_kept'):>9.2%}"
            f"{sum(relative) / len(group):>9.3%}{mean(group, 'top1_agreement'):>8.2%}"
            f"{mean(group, 'exact_match'):>7.1%}{mean(group, 'seconds'):>6.0f}  ({len(group)})"
        )


if __name__ == "__main__":
    main()
