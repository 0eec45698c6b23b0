"""Fine-tune the experts that compression is measured on: real full fine-tunes of a real model.

    python -m benchmarks.make_experts --data DIR [--only math sql] [--steps 64] [--seed 0]

DIR holds DOMAIN/train.jsonl and DOMAIN/test.jsonl with `prompt` and `response`; any data will do
(GSM8K, WikiSQL, NL2Bash, MedQuAD and MBPP were used for the committed figures). Five ordinary fine-tunes
of SmolLM2-135M-Instruct; `sql-long`, three times as long at six times the rate, whose delta is large;
and `shell-lora`, a LoRA fine-tune (Hu et al. 2021, arXiv 2106.09685) merged into the weights, whose
delta has low rank. Base and experts are kept in --cache, and what is there is not made again.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from deltamux.compression.streaming.rows import read_rows
from deltamux.serve.demo import batches as demo_batches
from deltamux.serve.demo import experts as demo_experts
from deltamux.serve.demo.base import make_base
from deltamux.serve.demo.data import Example

CACHE = Path.home() / ".cache" / "deltamux" / "experts"
BATCH_SIZE = 8
LORA_RANK = 16
LORA_SCALE = 2.0


@dataclass(frozen=True)
class Run:
    """One fine-tune: its data, its peak learning rate, how many times --steps, and its LoRA rank."""

    domain: str
    learning_rate: float = 5e-5
    length: int = 1
    rank: int | None = None


RUNS = {
    "sql": Run("sql"),
    "shell": Run("shell"),
    "math": Run("math"),
    "code": Run("code"),
    "medical": Run("medical"),
    "sql-long": Run("sql", learning_rate=3e-4, length=3),
    "shell-lora": Run("shell", learning_rate=1e-3, rank=LORA_RANK),
}


class LowRank(nn.Module):
    """W + 2 B A, as a parametrization of a linear's weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(LORA_RANK, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, LORA_RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that the linear uses."""
        return weight + LORA_SCALE * self.up @ self.down


def train_lora(base: Path, examples: list[Example], target: Path, run: Run, steps: int) -> None:
    """Train low-rank factors of every linear of the decoder, and save the merged weights."""
    model, tokenizer = demo_experts.load_model(base)
    model.requires_grad_(False)
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    encoded = demo_batches.encode(tokenizer, examples)
    batches = demo_batches.shuffled(encoded, BATCH_SIZE, steps, seed=0)
    bar = tqdm(batches, desc=target.name, total=steps, unit="step")
    demo_experts.fit_model(model, bar, steps, run.learning_rate)
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    demo_experts.save_model(model, tokenizer, target)


def read_examples(path: Path) -> list[Example]:
    return [Example(ask["content"], answer["content"]) for ask, answer in read_rows(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DOMAIN/train.jsonl under it")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, help="instead of each run's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base = arguments.cache / "base"
    make_base(base)
    for name in arguments.only:
        run, target = RUNS[name], arguments.cache / name
        if target.exists():
            continue
        examples = read_examples(arguments.data / run.domain / "train.jsonl")
        steps, rate = arguments.steps * run.length, arguments.learning_rate or run.learning_rate
        torch.manual_seed(arguments.seed)
        if run.rank:
            train_lora(base, examples, target, run, steps)
            continue
        report = demo_experts.train_expert(
            base,
            examples,
            target,
            steps=steps,
            batch_size=BATCH_SIZE,
            learning_rate=rate,
            seed=arguments.seed,
        )
        print(f"{name}: {report.seconds:.0f} s, {report.changed_share:.0%} of the weights changed")


if __name__ == "__main__":
    main()
