"""An expert with its text, and the rows that were measured on it."""

import argparse
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.make_experts import RUNS
from deltamux.compression.artifact.write import linear_weights
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.checkpoint import Checkpoint, open_checkpoint
from deltamux.compression.checkpoint.delta import Difference, compare
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.fixed import fixed_weights
from deltamux.compression.choice.measure import measure_key
from deltamux.compression.choice.problem import Choice
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.workspace import Ladder, Workspace
from deltamux.compression.evaluate import Evaluation, Reference
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.moments import InputMoments
from deltamux.compression.streaming.rows import read_rows
from deltamux.compression.streaming.text import Sample, encode_rows

MAX_TOKENS = 256


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
