"""Full fine-tuning of the demo's experts on a few CPU cores.

All weights train in float32: on CPUs without matrix units that is faster than bf16 autocast, and
no small update is rounded away while it accumulates. The finished expert is rounded to the base's
type once, so that the compressor sees a checkpoint like any other.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deltamux.serve.demo import batches as demo_batches
from deltamux.serve.demo.base import quiet_transformers, staged_directory
from deltamux.serve.demo.data import Example

# Together they take the held-out loss to a fraction in two minutes of two cores
# (held out, 1.55 → 0.14 for math; of 40 steps at half the rate 0.12, and 0.40 instead of 0.27 for sql); one by one
# chosen, not measured.
TRAIN_EXAMPLES = 480
TEST_EXAMPLES = 64
STEPS = 48
BATCH_SIZE = 4
LEARNING_RATE = 2e-4
WARMUP_SHARE = 0.1
FINAL_RATE_SHARE = 0.05
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainReport:
    """What a training run did.

    Attributes:
        steps: optimizer steps.
        seconds: wall time, loading and saving included.
        seconds_per_step: wall time of a step.
        first_loss: training loss of the first batch, nats per response token.
        last_loss: training loss of the last batch.
        changed_share: share of the weights that differ from the base after rounding.
    """

    steps: int
    seconds: float
    seconds_per_step: float
    first_loss: float
    last_loss: float
    changed_share: float


def train_expert(
    base: Path,
    examples: Sequence[Example],
    target: Path,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: bool = True,
) -> TrainReport:
    """Fine-tune every weight of `base` on the responses of `examples`, and save it to `target`.

    The checkpoint has the tensor names, types and tying of the base, and its tokenizer and
    generation settings. `target` appears only when it is complete.

    Raises:
        ValueError: `steps` or `batch_size` is not positive, or `examples` is empty.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"steps and batch_size must be positive, got {steps} and {batch_size}; pass 1 or more"
        )
    started = time.perf_counter()
    model, tokenizer = load_model(base)
    encoded = demo_batches.encode(tokenizer, examples)
    batches = demo_batches.shuffled(encoded, batch_size, steps, seed)
    bar = tqdm(batches, desc=target.name, total=steps, unit="step", disable=not progress)
    stepping = time.perf_counter()
    losses = fit_model(model, bar, steps, learning_rate)
    per_step = (time.perf_counter() - stepping) / steps
    save_model(model, tokenizer, target)
    changed = _changed_share(model, base)
    seconds = time.perf_counter() - started
    return TrainReport(steps, seconds, per_step, losses[0], losses[-1], changed)


def held_out_loss(checkpoint: Path, examples: Sequence[Example], batch_size: int = 16) -> float:
    """The mean negative log-likelihood of the responses' tokens, in nats."""
    model, tokenizer = load_model(checkpoint)
    model.eval()
    encoded = demo_batches.encode(tokenizer, examples)
    with torch.inference_mode():
        losses = [
            demo_batches.response_loss(model, batch)
            for batch in demo_batches.in_order(encoded, batch_size)
        ]
    return float(torch.cat(losses).mean())


def load_model(checkpoint: Path) -> tuple[Any, Any]:
    """The model in float32, its config still naming the stored type, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        model.config.dtype = AutoConfig.from_pretrained(checkpoint).dtype
        return model, AutoTokenizer.from_pretrained(checkpoint)


def save_model(model: Any, tokenizer: Any, target: Path) -> None:
    """Round a model to its stored type and write it; `target` appears only when it is complete."""
    model.to(model.config.dtype)
    with staged_directory(target) as staging, quiet_transformers():
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging)


def fit_model(
    model: Any, batches: "tqdm[demo_batches.Batch]", steps: int, rate: float
) -> list[float]:
    """Train what requires gradients in place; return the loss of every step."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_share(step, steps)
        loss = demo_batches.response_loss(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        batches.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def rate_share(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, linear decay."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - FINAL_RATE_SHARE) * (step - warmup + 1) / (steps - warmup)


def _changed_share(model: Any, base: Path) -> float:
    """The share of parameters whose stored values differ between the model and the base."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        old = AutoModelForCausalLM.from_pretrained(base, dtype=model.config.dtype)
    pairs = list(zip(model.parameters(), old.parameters(), strict=True))
    changed = sum(int((new != before).sum()) for new, before in pairs)
    return changed / sum(int(new.numel()) for new, _ in pairs)
