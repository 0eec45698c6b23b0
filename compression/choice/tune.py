"""By how much the chosen deltas are stretched, and what is learned beyond that.

What rounding leaves out of single matrices adds up over all of them, so that even deltas that are unbiased one by
one (`ladder.py`) leave the model short of its expert, the more so the coarser the rungs. One factor on
all deltas, the stretch, makes up for it. Close to its least value the divergence is a parabola in it,

    KL(s) = ½ e(s)ᵀ F e(s) ,   e(s) = s Δ̂ − Δ ,

with F the Fisher information of the weights, so that three measurements give the stretch.
"""

from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.distil import Student, distil
from deltamux.compression.choice.problem import Choice

# Stretches at which the divergence is measured, and the least and largest that is believed; chosen, not measured.
TRIED_STRETCHES = (1.0, 1.05, 1.1)
STRETCH_BOUNDS = (0.9, 1.2)


def tune(candidates: Candidates, choice: Choice) -> dict[str, float]:
    """The stretch of every linear: one for all, times learned ones where the recipe says so."""
    task = candidates.task
    stretch = best_stretch(candidates, choice)
    stretches = candidates.evenly(stretch)
    if task.recipe.distillation.passes and candidates.ladders:
        student = Student.of(candidates, choice)
        learnt = distil(
            student, task.difference.expert, task.learned, task.recipe.distillation, task.progress
        )
        stretches |= {name: stretch * more for name, more in learnt.items()}
    target = task.recipe.allocation.target_kl
    # Learned on other text, stretches can miss what was met without them.
    if target is not None and candidates.compared(choice, stretches).kl > target:
        return {}
    return stretches


def best_stretch(candidates: Candidates, choice: Choice) -> float:
    """The stretch that serves a choice best on the trial text; 1 without such text."""
    if candidates.task.trial is None or not any(choice):
        return 1.0
    divergences = [candidates.divergence(choice, stretch) for stretch in TRIED_STRETCHES]
    return least_of_parabola(divergences)[0]


def least_of_parabola(divergences: list[float]) -> tuple[float, float]:
    """The stretch of least divergence, and that divergence.

    Args:
        divergences: Measured at `TRIED_STRETCHES`.
    """
    first, middle, last = divergences
    width = TRIED_STRETCHES[1] - TRIED_STRETCHES[0]
    bend = first - 2 * middle + last
    if bend <= 0:
        return min(zip(TRIED_STRETCHES, divergences, strict=True), key=lambda pair: pair[1])
    slope = (last - first) / 2
    lowest, highest = STRETCH_BOUNDS
    factor = min(max(TRIED_STRETCHES[1] - width * slope / bend, lowest), highest)
    offset = (factor - TRIED_STRETCHES[1]) / width
    return factor, max(middle + slope * offset + bend * offset**2 / 2, 0.0)
