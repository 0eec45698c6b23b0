"""By how much the chosen deltas are stretched, and what is learned beyond that.

What rounding leaves out of single matrices adds up over all of them, so that even deltas that are unbiased one by
one (`ladder.py`) leave the model short of its expert, the more so the coarser the rungs. One factor on
all deltas makes up for it. Close to its least value the divergence is a parabola in that factor,

    KL(s) = ½ e(s)ᵀ F e(s) ,   e(s) = s Δ̂ − Δ ,

with F the Fisher information of the weights, so that three measurements give the factor.
"""

from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.distil import Student, distil
from deltamux.compression.choice.problem import Choice

# Factors at which the divergence is measured, and the least and largest that is believed: chosen, not measured;
# factors of real experts were 1.00 to 1.09.
STRETCHES = (1.0, 1.05, 1.1)
STRETCH_BOUNDS = (0.9, 1.2)


def tune(candidates: Candidates, choice: Choice) -> dict[str, float]:
    """What every linear's steps are multiplied with: one factor, or learned ones where the recipe says so."""
    task = candidates.task
    stretch = best_stretch(candidates, choice)
    factors = candidates.stretched(stretch)
    if task.recipe.distillation.steps and candidates.ladders:
        student = Student.of(candidates, choice)
        learnt = distil(
            student, task.difference.expert, task.learned, task.recipe.distillation, task.progress
        )
        factors |= {name: stretch * factor for name, factor in learnt.items()}
    target = task.recipe.allocation.target_kl
    # Learned on other text, the factors can miss what was met without them.
    if target is not None and candidates.compared(choice, factors).kl > target:
        return {}
    return factors


def best_stretch(candidates: Candidates, choice: Choice) -> float:
    """The factor that serves a choice best on the trial text; 1 without such text."""
    if candidates.task.trial is None or not any(choice):
        return 1.0
    divergences = [candidates.divergence(choice, stretch) for stretch in STRETCHES]
    return least_of_parabola(divergences)[0]


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
