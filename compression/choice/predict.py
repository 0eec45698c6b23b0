"""Which rungs are worth measuring: a look at some rows of every matrix.

Rounding and encoding all rungs of all rows to keep one of them is most of a compression's time. So where the choice
follows from bytes and errors alone, all rungs are measured on a sample of each matrix's rows: what a rung
takes and loses is a sum over rows, and under feedback rows are independent of each other. The choice among
predicted rungs says which ones are measured in full (`measure.py`); the final choice is made among these.
"""

import torch

from deltamux.compression.checkpoint.architecture import TensorSpec
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.choose import choose_within, importances, rate_curves
from deltamux.compression.choice.measure import (
    few_directions_in,
    ladder_of,
    linears_by_layer,
    measure_layer,
    measure_linear,
    through,
    ways_of_steps,
)
from deltamux.compression.choice.problem import Choice, pareto_front
from deltamux.compression.choice.workspace import Ladder, Workspace
from deltamux.compression.recipe import Recipe
from deltamux.compression.rounding.ladder import Linear, coded_steps
from deltamux.compression.streaming.moments import InputMoments

# Rows that rungs are predicted from: one in so many, and no fewer than so many. On the second layer of a math fine-tune of
# SmolLM2-135M predicted bytes are 0 to 3 % above the real ones, errors within 7 % (one matrix of 576 rows: 22 %).
SAMPLED_PART, SAMPLED_ROWS = 8, 96
# Of the limit on disk, what is shared out by predicted bytes.
SHARED_OUT = 1.02
# Of a rung's bytes, those that do not grow with its rows: 80 to 500 in the same matrices.
STREAM_BYTES = 200
# A sample whose energy differs from its rows' part by more than this share is none: all rows are measured. Chosen, not
# measured.
ENERGY_SPREAD = 0.3


def predict(
    difference: Difference,
    recipe: Recipe,
    inputs: InputMoments,
    work: Workspace,
    progress: bool = True,
) -> list[Ladder]:
    """Predict the entropy-coded rungs of every linear whose delta is not zero, from a sample of its rows.

    Layers of a merged adapter are measured at once, in all ways.

    Args:
        difference: Base and expert.
        recipe: What is to be done.
        inputs: Second moments of the linears' inputs.
        work: Where finished layers are kept; those it has are not looked at again.
        progress: Show a bar.
    """

    def look(layer: int, specs: list[TensorSpec], linears: dict[str, Linear]) -> None:
        if few_directions_in(recipe, linears):
            measure_layer(difference, recipe, specs, linears, work)
            work.save_predicted(layer, work.ladders(layer))
            return
        found = [
            predict_linear(spec, linears.pop(spec.name)) for spec in specs if spec.name in linears
        ]
        work.save_predicted(layer, [ladder for ladder in found if ladder is not None])

    layers = linears_by_layer(difference)
    through(difference, inputs, work.has_predicted, look, ("predict", progress))
    return [ladder for layer in layers for ladder in work.predicted(layer)]


def shortlist(candidates: Candidates) -> dict[str, list[int]]:
    """Which steps are worth measuring, by predicted ladders: of each linear the chosen one and the next coarser.

    Bytes are predicted some per cent off. So somewhat more than there is are shared out here, and coarser steps bring
    what is measured within the limit.

    Raises:
        ValueError: A limit cannot be kept.
    """
    task, ladders = candidates.task, candidates.ladders
    kind = task.recipe.allocation.importance
    curves = rate_curves(ladders, importances(kind, ladders, task.difference.expert, task.fitted))
    choice = choose_within(candidates, curves, _unmeasured, SHARED_OUT)
    found: dict[str, list[int]] = {}
    for ladder, curve, rung in zip(ladders, curves, choice, strict=True):
        if not ladder.steps:
            continue
        front = pareto_front(curve)
        coarser = [each for each in front if each < rung]
        rungs = {rung or front[-1 if len(front) < 2 else 1], *coarser[-1:]} - {0}
        found[ladder.name] = sorted(ladder.steps[each - 1] for each in rungs)
    return found


def _unmeasured(_choice: Choice) -> float:
    raise AssertionError("what is predicted is not measured")


def _whole_bytes(sampled: int, share: float) -> int:
    """Bytes of a stream whose rows are so many times the sampled ones; more of these are never fewer of those."""
    fixed = min(STREAM_BYTES, sampled / 2)
    return round(fixed + (sampled - fixed) * share)


def predict_linear(spec: TensorSpec, linear: Linear) -> Ladder | None:
    """What the rungs of a linear will take and lose, from some of its rows; None: nothing is left in any.

    Args:
        spec: The linear.
        linear: Its delta and inputs.
    """
    rows = len(linear.delta_NK)
    count = min(rows, max(-(-rows // SAMPLED_PART), SAMPLED_ROWS))
    sample = linear.of_rows(torch.arange(count, device=linear.delta_NK.device) * rows // count)
    if abs(sample.energy * rows / count - linear.energy) > ENERGY_SPREAD * linear.energy:
        sample, count = linear, rows
    found = measure_linear(spec, ways_of_steps(sample, None, coded_steps(linear)), None)
    if not found:
        return None
    share = rows / count
    entries = [
        rung.entry.model_copy(
            update={
                "shape": tuple(linear.delta_NK.shape),
                "rows": rows,
                "bytes": _whole_bytes(rung.entry.bytes, share),
                "slot_bytes": round((rung.entry.slot_bytes or 0) * share),
            }
        )
        for _, rung in found
    ]
    return ladder_of(spec, linear.energy, entries, tuple(step for step, _ in found))
