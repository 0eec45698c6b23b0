"""Which rung every linear gets, and by how much all of them are stretched.

The allocators predict; what they propose is written, read back and measured on calibration text. What
rounding leaves out of single matrices adds up over all of them, so that even deltas that are unbiased one by
one (`ladder.py`) leave the model short of its expert, the more so the coarser the rungs. One factor on
all deltas makes up for it. Close to its least value the divergence is a parabola in that factor,

    KL(s) = ½ e(s)ᵀ F e(s) ,   e(s) = s Δ̂ − Δ ,

with F the Fisher information of the weights, so that three measurements give the factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import reconstructed
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.budget import choose_family, importances
from deltamux.compression.choice.draft import Draft, fixed_part, write_artifact
from deltamux.compression.choice.problem import Choice
from deltamux.compression.choice.workspace import Measured, Workspace
from deltamux.compression.evaluate import Evaluation, Reference
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.text import Sample

# Calibration conversations that choices are compared on.
TRIAL_SAMPLES = 12
# Factors at which the divergence is measured, and the least and largest that is believed.
STRETCHES = (1.0, 1.05, 1.1)
STRETCH_BOUNDS = (0.9, 1.2)


@dataclass(frozen=True)
class Job:
    """What is compressed, how, and the directory that is filled."""

    difference: Difference
    recipe: Recipe
    target: Path
    held_out: list[Sample]
    progress: bool = True

    @cached_property
    def reference(self) -> Reference:
        """Base and expert on the held-out text."""
        return self.reference_on(self.held_out)

    def reference_on(self, samples: list[Sample]) -> Reference:
        """Base and expert on some text."""
        return Reference(self.difference.base, self.difference.expert, samples, self.progress)

    def write(self, draft: Draft) -> Artifact:
        """Write everything but the card, and read it back."""
        write_artifact(self.difference, self.recipe, draft, self.target)
        artifact = Artifact(self.target)
        artifact.check_content()
        return artifact

    def compared(self, artifact: Artifact) -> Evaluation | None:
        """The comparison with the expert on held-out text, if there is any."""
        if not self.held_out:
            return None
        return self.reference.compare(reconstructed(artifact, self.difference.base))


class Rungs:
    """The measured linears of a job, and the fixed part that goes with them."""

    def __init__(self, job: Job, work: Workspace, measured: list[Measured]) -> None:
        self.job, self.work, self.measured = job, work, measured
        self.fixed = fixed_part(job.difference, job.recipe.embedding)

    def write(self, choice: Choice, factors: dict[str, float] | None = None) -> Artifact:
        """The artifact of a choice, its steps times factors by weight name."""
        draft = self.fixed.with_linears(self.work, self.measured, choice, factors or {})
        return self.job.write(draft)

    def stretched(self, factor: float) -> dict[str, float]:
        """One factor for every linear."""
        return dict.fromkeys([matrix.name for matrix in self.measured], factor)

    def divergences(
        self, choice: Choice, trial: Reference, stretches: Sequence[float]
    ) -> list[float]:
        """The KL that a choice leaves on some text, with each of some factors on all its deltas."""
        artifact, base = self.write(choice), self.job.difference.base
        return [
            trial.divergence(reconstructed(artifact, base, self.stretched(stretch)))
            for stretch in stretches
        ]

    def best_stretch(
        self, choice: Choice, trial: Reference, typical: float | None = None
    ) -> tuple[float, float]:
        """The factor that serves a choice best on some text, and the divergence with it.

        Args:
            choice: Rungs.
            trial: The text.
            typical: The divergence at the middle one of `STRETCHES`, if it is known.
        """
        if typical is None:
            return least_of_parabola(self.divergences(choice, trial, STRETCHES))
        first, last = self.divergences(choice, trial, (STRETCHES[0], STRETCHES[2]))
        return least_of_parabola([first, typical, last])

    def select(self, calibration: list[Sample]) -> tuple[Choice, float]:
        """The best choice within the recipe's limit, and the factor on all its steps.

        Args:
            calibration: Conversations, at best those that the rungs were measured on.

        Raises:
            ValueError: The limit cannot be kept.
        """
        recipe, difference = self.job.recipe, self.job.difference
        telling = [sample for sample in calibration if len(sample.predicted)][-TRIAL_SAMPLES:]
        trial = self.job.reference_on(telling) if telling else None
        compared: dict[tuple[int, ...], float] = {}

        def divergence(choice: Choice) -> float:
            if trial is None:
                return 0.0
            (compared[tuple(choice)],) = self.divergences(choice, trial, STRETCHES[1:2])
            return compared[tuple(choice)]

        choice = choose_family(
            recipe,
            difference,
            self.measured,
            importances(
                recipe.allocation.importance, self.measured, difference.expert, calibration
            ),
            self.fixed,
            attempt=lambda choice: self.job.compared(self.write(choice)),
            divergence=divergence,
        )
        if trial is None:
            return choice, 1.0
        return choice, self.best_stretch(choice, trial, compared.get(tuple(choice)))[0]


def least_of_parabola(divergences: list[float]) -> tuple[float, float]:
    """The factor of least divergence, and that divergence.

    Args:
        divergences: Measured at `STRETCHES`.
    """
    first, middle, last = divergences
    width = STRETCHES[1] - STRETCHES[0]
    bend = first - 2 * middle + last
    if bend <= 0:
        return min(zip(STRETCHES, divergences, strict=True), key=lambda pair: pair[1])
    slope = (last - first) / 2
    lowest, highest = STRETCH_BOUNDS
    factor = min(max(STRETCHES[1] - width * slope / bend, lowest), highest)
    offset = (factor - STRETCHES[1]) / width
    return factor, max(middle + slope * offset + bend * offset**2 / 2, 0.0)
