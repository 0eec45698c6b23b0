"""From a limit (bits, bytes, or divergence) to a rung for every linear."""

import math
from collections.abc import Callable
from functools import partial

from deltamux.compression.artifact.artifact import TensorEntry, tensor_bytes
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.draft import Draft, linear_weights
from deltamux.compression.choice.evolution import evolve
from deltamux.compression.choice.llm import LlmOperator
from deltamux.compression.choice.problem import (
    Allocator,
    Choice,
    Curve,
    Rung,
    allocate,
    keep_rungs,
    total_bytes,
)
from deltamux.compression.choice.workspace import Measured
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.recipe import (
    AllocationRecipe,
    Importance,
    ObjectiveKind,
    Recipe,
)
from deltamux.compression.streaming.fisher import output_sensitivity
from deltamux.compression.streaming.text import Sample

# What safetensors' header spends on a tensor besides its name: dtype, shape, two offsets.
HEADER_BYTES = 100
# And on the file: its length, our metadata, padding.
FILE_BYTES = 100
# The search for a divergence: bits to start from, and how often the result is written and measured.
SEARCH_BITS = (0.1, 6.0)
SEARCH_STEPS = 7
SENSITIVITY_SAMPLES = 24
# What an error of a low-rank rung costs to that of the same error of a full-rank one: in general, and in a
# merged adapter, where few directions hold the whole delta and what is lost is the slot's rounding, mere noise.
LOW_RANK_COST = 4.0
ADAPTER_COST = 0.25
# An adapter has few directions in this share of its matrices.
ADAPTER_SHARE = 0.5
# Tensors of a matrix at most: codes and steps of two factors (or with salient channels), and of a sketch.
FACTORED_TENSORS = {False: 4, True: 6}

Attempt = Callable[[Choice], Evaluation | None]


def check_measurable(recipe: AllocationRecipe, held_out: bool) -> None:
    """Refuse what must be measured where there is no text to measure it on.

    Raises:
        ValueError: The recipe has a target_kl or a measured objective, but there is no such text.
    """
    if recipe.target_kl is not None and not held_out:
        raise ValueError("target_kl needs held-out text: pass --held-out")
    if recipe.objective is ObjectiveKind.MEASURED and not held_out:
        raise ValueError("objective 'measured' needs held-out text: pass --held-out")


def choose(
    recipe: AllocationRecipe,
    difference: Difference,
    curves: list[Curve],
    fixed: Draft,
    attempt: Attempt,
) -> Choice:
    """A rung for every matrix: 0 for no delta, i for its i-th entry.

    Args:
        recipe: The limit and how to share it out.
        difference: Base and expert.
        curves: The matrices' ladders, of `rate_curves`.
        fixed: What takes bytes besides the linears.
        attempt: Writes a choice and measures it; None where nothing is to be measured (see
            `check_measurable`).

    Raises:
        ValueError: The limit cannot be kept.
    """
    if all(len(curve.rungs) == 2 for curve in curves) and not recipe.limited:
        return [1] * len(curves)
    weights = linear_weights(difference)

    def objective(choice: Choice) -> float:
        result = attempt(choice)
        assert result is not None
        return result.kl

    measured = objective if recipe.objective is ObjectiveKind.MEASURED else None
    method = _method(recipe)

    def at_bits(bits: float) -> Choice:
        return allocate(method, curves, int(bits * weights / 8), measured)

    if recipe.num_bytes is not None:
        budget = recipe.num_bytes - _overhead(curves, fixed)
        if budget < 0:
            raise ValueError(
                f"num_bytes must be at least {recipe.num_bytes - budget:,} for embedding, norms and "
                f"headers alone, got {recipe.num_bytes:,}: raise it or the embedding's step"
            )
        return allocate(method, curves, budget, measured)
    if recipe.target_kl is not None:
        return _search(recipe.target_kl, at_bits, attempt)
    assert recipe.limiting_bits is not None
    return at_bits(recipe.limiting_bits)


def choose_family(
    recipe: Recipe,
    difference: Difference,
    measured: list[Measured],
    importance: list[float],
    fixed: Draft,
    *,
    attempt: Attempt,
    divergence: Callable[[Choice], float],
) -> Choice:
    """The better of two choices: with low-rank rungs, where there are any that may pay, and without.

    Errors of the two kinds of rungs do not compare. A low-rank rung leaves whole directions out, which
    adds up over matrices, while what a full-rank rung leaves is close to noise: of equal errors the
    low-rank one costs more (`LOW_RANK_COST`), but in merged adapters. How much more depends on rate and
    expert, so both are tried.

    Args:
        recipe: Its allocation is that of `choose`.
        difference: Base and expert.
        measured: The matrices and their ladders.
        importance: Of `importances`.
        fixed: What takes bytes besides the linears.
        attempt: Writes a choice and measures it on held-out text.
        divergence: Writes a choice and measures its KL on calibration text.
    """
    curves = rate_curves(measured, importance)
    full_rank = [
        [0, *(i for i, entry in enumerate(matrix.entries, start=1) if entry.rank is None)]
        for matrix in measured
    ]

    def original(choice: Choice) -> Choice:
        return [kept[rung] for kept, rung in zip(full_rank, choice, strict=True)]

    allocation = recipe.allocation
    reduced = [keep_rungs(curve, kept) for curve, kept in zip(curves, full_rank, strict=True)]
    plain = original(
        choose(allocation, difference, reduced, fixed, lambda choice: attempt(original(choice)))
    )
    if reduced == curves or not (recipe.measures_low_rank or is_adapter(measured)):
        return plain
    mixed = choose(allocation, difference, curves, fixed, attempt)
    if allocation.target_kl is not None:
        return min(mixed, plain, key=lambda choice: total_bytes(curves, choice))
    return min(mixed, plain, key=divergence)


def importances(
    kind: Importance, measured: list[Measured], expert: Checkpoint, samples: list[Sample]
) -> list[float]:
    """What the loss of all of a matrix's delta is taken to cost.

    Weights: every matrix may lose the same share of its delta's output energy at the same price a
    weight, since a fine-tune moves each by what it needs of it. The root of energies, not energies:
    what rounding takes off the deltas points the same way in every matrix, so that amplitudes add
    up, not squares.
    """
    if kind is Importance.WEIGHTS:
        return [float(_num_weights(matrix)) for matrix in measured]
    if kind is Importance.ENERGY:
        return [math.sqrt(matrix.energy) for matrix in measured]
    felt = output_sensitivity(expert, samples[:SENSITIVITY_SAMPLES])
    return [math.sqrt(matrix.energy * float(felt[matrix.name].mean())) for matrix in measured]


def rate_curves(measured: list[Measured], importance: list[float]) -> list[Curve]:
    """The measured ladders as the allocators read them."""
    low_rank_cost = ADAPTER_COST if is_adapter(measured) else LOW_RANK_COST

    def counted(entry: TensorEntry) -> float:
        return entry.error * (1.0 if entry.rank is None else low_rank_cost)

    return [
        Curve(
            name=matrix.name,
            layer=matrix.layer,
            num_weights=_num_weights(matrix),
            importance=cost,
            rungs=(
                Rung(0, 1.0),
                *(Rung(entry.bytes, counted(entry)) for entry in matrix.entries),
            ),
            num_tensors=FACTORED_TENSORS[_has_few_directions(matrix)],
        )
        for matrix, cost in zip(measured, importance, strict=True)
    ]


def is_adapter(measured: list[Measured]) -> bool:
    """Whether few directions hold the delta of most matrices."""
    return sum(map(_has_few_directions, measured)) > ADAPTER_SHARE * len(measured)


def _has_few_directions(matrix: Measured) -> bool:
    return any(entry.input_directions for entry in matrix.entries)


def _method(recipe: AllocationRecipe) -> str | Allocator:
    """The allocator, with a language model to propose offspring where the recipe names one."""
    if recipe.proposer is None:
        return recipe.method.value
    operator = LlmOperator(recipe.proposer.base_url, recipe.proposer.model)
    return partial(evolve, operator=operator)


def _num_weights(matrix: Measured) -> int:
    rows, columns = matrix.entries[0].shape
    return rows * columns


def _overhead(curves: list[Curve], fixed: Draft) -> int:
    """Bytes of the weights file besides the linears' tensors, as an upper bound."""
    names = [*fixed.tensors]
    for curve in curves:
        names += [f"{curve.name}.inputs.deflated"] * curve.num_tensors
    return (
        FILE_BYTES + tensor_bytes(fixed.tensors) + sum(len(name) + HEADER_BYTES for name in names)
    )


def _search(target: float, at_bits: Callable[[float], Choice], attempt: Attempt) -> Choice:
    """The fewest bits whose measured divergence stays within the target, by bisection of log bits."""
    low, high = SEARCH_BITS
    best = at_bits(high)
    result = attempt(best)
    assert result is not None
    if result.kl > target:
        raise ValueError(
            f"target_kl {target:g} cannot be met: the finest rungs reach {result.kl:.3g} nats per "
            "token; raise the target, lower the embedding's step, or use --lossless"
        )
    for _ in range(SEARCH_STEPS):
        middle = (low * high) ** 0.5
        choice = at_bits(middle)
        result = attempt(choice)
        assert result is not None
        if result.kl <= target:
            best, high = choice, middle
        else:
            low = middle
    return best
