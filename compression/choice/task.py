"""What is compressed and how, and the texts that it is measured on."""

from dataclasses import dataclass
from functools import cached_property

from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.evaluate import Reference
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.text import Sample

# The part of the calibration text that distillation has for itself: one in so many; chosen, not measured.
DISTILLATION_SHARE = 4
# Calibration conversations that choices are compared on; chosen, not measured.
TRIAL_SAMPLES = 12


@dataclass(frozen=True)
class Task:
    """One compression.

    Attributes:
        difference: Base and expert.
        recipe: What is to be done.
        fitted: Conversations that codes are fitted to.
        learned: Conversations that steps are learned from: others, where there are enough.
        held_out: Conversations that the result is verified on; none: it is not verified.
        progress: Whether to show bars.
    """

    difference: Difference
    recipe: Recipe
    fitted: list[Sample]
    learned: list[Sample]
    held_out: list[Sample]
    progress: bool = True

    @classmethod
    def of(
        cls,
        difference: Difference,
        recipe: Recipe,
        calibration: list[Sample],
        held_out: list[Sample],
        progress: bool = True,
    ) -> "Task":
        """Share out the calibration text."""
        count = len(calibration) // DISTILLATION_SHARE if recipe.distillation.passes else 0
        split = len(calibration) - count
        learned = calibration[split:] if count else calibration
        return cls(difference, recipe, calibration[:split], learned, held_out, progress)

    @cached_property
    def reference(self) -> Reference | None:
        """Base and expert on the held-out text, if there is any."""
        return self._reference(self.held_out)

    @cached_property
    def trial(self) -> Reference | None:
        """Base and expert on the calibration text that choices are compared on, if there is any."""
        telling = [sample for sample in self.fitted if len(sample.predicted)]
        return self._reference(telling[-TRIAL_SAMPLES:])

    def _reference(self, samples: list[Sample]) -> Reference | None:
        if not samples:
            return None
        return Reference(self.difference.base, self.difference.expert, samples, self.progress)
