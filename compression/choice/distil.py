"""Scale distillation: codes stay, steps learn from the expert's predictions.

The divergence KL(expert ‖ compressed) on calibration text is lowered over one factor for every
matrix's steps (ME-Switch, arXiv 2406.09041, and BitDelta, arXiv 2402.10193, train scales against the
expert's outputs). With y = (W + e^θ Δ̂) x the gradient is

    ∂KL/∂θ = Σ_t ⟨∂KL/∂y_t , e^θ Δ̂ x_t⟩ .

What the layer-wise stretch of `ladder.py` cannot see, because errors meet in later layers and on text that
was not calibrated on, is learned here. A few passes of Adam (Kingma & Ba 2014, arXiv 1412.6980) suffice,
as the stretches start close to one. Base, codes and expert stream layer by layer, so that memory holds
one layer and the activations between layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from tqdm import tqdm

from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.problem import Choice
from deltamux.compression.recipe import DistillationRecipe
from deltamux.compression.streaming.backward import Activated, final_gradients, layer_gradients
from deltamux.compression.streaming.forward import StreamedModel, WeightSource, batches
from deltamux.compression.streaming.text import Sample

BATCH_TOKENS = 2_048
# A stretch outside of these bounds would mean another fine-tune, not a better scale; chosen, not measured.
MAX_STRETCH = 2.0


@dataclass(frozen=True)
class Student:
    """A compressed expert whose steps are to be learned.

    Attributes:
        scaled: Stretches of the linears' steps, by weight name, to the weights with them.
        delta: The part of a linear's delta that its steps scale, float32 [N, K].
        names: Those linears.
    """

    scaled: Callable[[dict[str, float]], WeightSource]
    delta: WeightSource
    names: list[str]

    @classmethod
    def of(cls, candidates: Candidates, choice: Choice) -> "Student":
        """A choice over its base."""
        return cls(
            scaled=lambda stretches: candidates.smooth_weights(choice, stretches),
            delta=lambda name: candidates.linear(choice, name).scalable(),
            names=candidates.changed(choice),
        )


def distil(
    student: Student,
    expert: Checkpoint,
    samples: list[Sample],
    recipe: DistillationRecipe,
    progress: bool = True,
) -> dict[str, float]:
    """Learn a stretch for the steps of every matrix of the decoder.

    Args:
        student: What learns.
        expert: The teacher.
        samples: Conversations to learn from, best ones that the codes were not fitted to.
        recipe: Passes over the samples, and Adam's first learning rate.
        progress: Show a bar.

    Returns:
        Weight name to stretch: that of the pass with the lowest divergence.
    """
    teacher = _Teacher(expert, list(batches(samples, BATCH_TOKENS)))
    logs = torch.zeros(len(student.names), requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=recipe.learning_rate)
    best, best_kl = dict.fromkeys(student.names, 1.0), math.inf
    with tqdm(total=recipe.passes + 1, desc="distil", unit="pass", disable=not progress) as bar:
        for index in range(recipe.passes + 1):
            stretches = dict(zip(student.names, logs.detach().exp().tolist(), strict=True))
            kl, slopes = _gradient(student, stretches, teacher, expert)
            if kl < best_kl:
                best, best_kl = stretches, kl
            bar.update()
            bar.set_postfix(kl=f"{kl:.5f}")
            logs.grad = torch.tensor([slopes[name] for name in student.names])
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * (
                1 - index / (recipe.passes + 1)
            )
            optimizer.step()
            with torch.no_grad():
                logs.clamp_(-math.log(MAX_STRETCH), math.log(MAX_STRETCH))
    return best


class _Teacher:
    """The expert's final hidden states on every batch."""

    def __init__(self, expert: Checkpoint, plan: list[list[Sample]]) -> None:
        self._model = StreamedModel(expert.config, expert.load, torch.float32, expert.tied)
        self.plan = plan
        self._head_VH = self._model.head()
        self._hidden_PH = self._model.hidden_states(plan)

    @torch.no_grad()
    def log_probabilities(self, places: slice) -> torch.Tensor:
        logits_PV = self._model.logits(self._hidden_PH[places], self._head_VH)
        return functional.log_softmax(logits_PV, dim=-1)


def _gradient(
    student: Student, stretches: dict[str, float], teacher: _Teacher, expert: Checkpoint
) -> tuple[float, dict[str, float]]:
    """KL in nats per predicting position, and its slope in the logarithm of every stretch."""
    model = StreamedModel(expert.config, student.scaled(stretches), torch.float32, expert.tied)
    run = Activated.through(model, teacher.plan)
    positions = sum(len(state.targets_P) for state in run.states)
    head_VH = model.head()
    total = 0.0

    def divergence(final_PH: torch.Tensor, places: slice) -> torch.Tensor:
        nonlocal total
        wanted_PV = teacher.log_probabilities(places)
        logs_PV = functional.log_softmax(model.logits(final_PH, head_VH), dim=-1)
        found = functional.kl_div(logs_PV, wanted_PV, log_target=True, reduction="sum")
        total += float(found.detach())
        return found / positions

    gradients = final_gradients(run, divergence)
    slopes = dict.fromkeys(stretches, 0.0)
    deltas: dict[str, torch.Tensor] = {}

    def add_slope(name: str, x_BTK: torch.Tensor, gradient_BTN: torch.Tensor) -> None:
        if name not in stretches:
            return
        if name not in deltas:
            deltas[name] = student.delta(name).to(x_BTK.device)
        product_BTN = x_BTK @ deltas[name].T
        slopes[name] += stretches[name] * float((product_BTN * gradient_BTN).sum())

    for layer in reversed(range(model.num_layers)):
        gradients = layer_gradients(run, layer, gradients, add_slope)
        deltas.clear()
    return total / positions, slopes
