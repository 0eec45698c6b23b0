"""From the limits of a recipe (bits, bytes, divergence, bits in a slot) to a rung for every linear."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

from deltamux.compression.artifact.matrices import FactoredEntry
from deltamux.compression.artifact.stored import LinearEntry, tensor_bytes
from deltamux.compression.artifact.write import linear_records, linear_weights
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.evolution import evolve
from deltamux.compression.choice.llm import LlmOperator
from deltamux.compression.choice.methods import Allocator, allocate
from deltamux.compression.choice.problem import (
    Choice,
    Curve,
    Rung,
    keep_rungs,
    total_bytes,
    total_slot_bytes,
)
from deltamux.compression.choice.tune import TRIED_STRETCHES
from deltamux.compression.choice.workspace import Ladder
from deltamux.compression.recipe import AllocationRecipe, Importance, ObjectiveKind, Recipe
from deltamux.compression.streaming.fisher import output_sensitivity
from deltamux.compression.streaming.text import Sample

# What safetensors' header spends on a tensor besides its name: dtype, shape, two offsets.
HEADER_BYTES = 100
# And on the file: its length, our metadata, padding.
FILE_BYTES = 100
# Tensors of a linear at most: codes and steps of two factors, or codes, steps and a salient part.
LINEAR_TENSORS = 4
LONGEST_SUFFIX = "salient_channels"
# The search for a divergence: bits to start from, and how often a choice is measured. Seven halvings of the
# logarithm leave 3 % of the bits.
SEARCH_BITS = (0.1, 6.0)
SEARCH_STEPS = 7
# Conversations that the Fisher information is taken of; chosen, not measured.
SENSITIVITY_SAMPLES = 24
# What an error of a low-rank rung costs to that of the same error of a full-rank one. In the first 15 layers of a math
# fine-tune of SmolLM2-135M, at 0.3 bits, 1, 2, 4, 8, 16 and 32 leave a KL of 1.23, 1.19, 0.95, 0.75, 0.80 and 0.94
# thousandths; at 0.5 bits 1, 2, 4 and 8 leave 0.73, 0.55, 0.22 and 0.15. Without low-rank rungs it is 3.4 and 0.12.
LOW_RANK_COST = 8.0
# Of a limit on disk that the limit in a slot leaves unused before that is worth a warning.
UNUSED_SHARE = 0.1

logger = logging.getLogger("deltamux.compress")


def check_measurable(recipe: AllocationRecipe, held_out: bool) -> None:
    """Refuse what must be measured where there is no text to measure it on.

    Raises:
        ValueError: The recipe has a target_kl or a measured objective, but there is no such text.
    """
    if recipe.target_kl is not None and not held_out:
        raise ValueError("target_kl needs held-out text: pass --held-out")
    if recipe.objective is ObjectiveKind.MEASURED and not held_out:
        raise ValueError("objective 'measured' needs held-out text: pass --held-out")


def choose(candidates: Candidates) -> Choice:
    """A rung for every linear: the better of two choices, with low-rank rungs and without.

    Errors of the two kinds of rungs do not compare. A low-rank rung leaves whole directions out, which
    adds up over matrices, while what a full-rank rung leaves is close to noise: of equal errors the
    low-rank one costs more (`LOW_RANK_COST`). How much more depends on rate and expert, so both are tried, on
    calibration text.

    Raises:
        ValueError: A limit cannot be kept.
    """
    task, ladders = candidates.task, candidates.ladders
    if not ladders:
        return []
    costs = importances(
        task.recipe.allocation.importance, ladders, task.difference.expert, task.fitted
    )
    curves = rate_curves(ladders, costs)
    every = [list(range(len(curve.rungs))) for curve in curves]
    full_rank = [
        [0, *(i for i, entry in enumerate(ladder.entries, start=1) if not _is_factored(entry))]
        for ladder in ladders
    ]
    if full_rank == every:
        return _choose_of(candidates, curves, every)
    found = [_choose_of(candidates, curves, kept) for kept in (every, full_rank)]
    if task.recipe.allocation.target_kl is not None:
        return min(found, key=lambda choice: total_bytes(curves, choice))
    if task.trial is None:
        return found[1]
    return min(found, key=lambda choice: candidates.divergence(choice, TRIED_STRETCHES[1]))


def _choose_of(candidates: Candidates, curves: list[Curve], kept: list[list[int]]) -> Choice:
    """The choice among some rungs of every curve, in the numbering of all of them."""
    reduced = [keep_rungs(curve, rungs) for curve, rungs in zip(curves, kept, strict=True)]

    def original(choice: Sequence[int]) -> Choice:
        return [rungs[rung] for rungs, rung in zip(kept, choice, strict=True)]

    def measured(choice: Choice) -> float:
        return candidates.compared(original(choice)).kl

    return original(choose_within(candidates, reduced, measured))


def choose_within(
    candidates: Candidates,
    curves: list[Curve],
    measured: Callable[[Choice], float],
    share: float = 1.0,
) -> Choice:
    """A rung for every curve within the recipe's limits.

    Args:
        candidates: What is chosen from.
        curves: Of its ladders.
        measured: The KL of a choice on held-out text.
        share: Of the bytes on disk that may be used, where they are what is limited.

    Raises:
        ValueError: A limit cannot be kept.
    """
    difference, recipe = candidates.task.difference, candidates.task.recipe
    allocation = recipe.allocation
    slot_bytes = slot_budget(candidates, curves)
    if _has_one_rung(recipe, curves):
        return [1] * len(curves)
    objective = measured if allocation.objective is ObjectiveKind.MEASURED else None
    method = _method(allocation)

    def within(disk_bytes: int) -> Choice:
        return allocate(method, curves, disk_bytes, objective, slot_bytes)

    def at_bits(bits: float) -> Choice:
        return within(int(bits * linear_weights(difference) / 8))

    if allocation.target_kl is not None:
        return _search(recipe, at_bits, measured)
    budget = _disk_budget(candidates)
    choice = within(int(share * budget))
    if share == 1 and slot_bytes is not None:
        _warn_of_unused(curves, choice, budget)
    return choice


def _disk_budget(candidates: Candidates) -> int:
    """Bytes that the linears may take on disk.

    Raises:
        ValueError: All else alone takes more than is allowed.
    """
    allocation = candidates.task.recipe.allocation
    if allocation.num_bytes is None:
        assert allocation.limiting_bits is not None
        return int(allocation.limiting_bits * linear_weights(candidates.task.difference) / 8)
    budget = allocation.num_bytes - _overhead(candidates)
    if budget < 0:
        raise ValueError(
            f"num_bytes must be at least {allocation.num_bytes - budget:,} for embedding, norms "
            f"and headers alone, got {allocation.num_bytes:,}: raise it or the embedding's step"
        )
    return budget


def slot_budget(candidates: Candidates, curves: list[Curve]) -> int | None:
    """Bytes that the linears' sections may take in a slot; None: any.

    Raises:
        ValueError: Records alone, or matrices of a fixed width, take more.
    """
    difference, recipe = candidates.task.difference, candidates.task.recipe
    bits = recipe.limiting_slot_bits
    if bits is None:
        return None
    weights, records = linear_weights(difference), linear_records(difference)
    budget = int(bits * weights / 8) - records
    whole = [1 if _has_one_rung(recipe, curves) else 0] * len(curves)
    least = total_slot_bytes(curves, whole)
    if budget < least:
        raise ValueError(
            f"slot_bits {bits:g} cannot be kept: no less than {(least + records) * 8 / weights:.3g} bits "
            "per linear weight will do; raise slot_bits"
        )
    return budget


def _has_one_rung(recipe: Recipe, curves: list[Curve]) -> bool:
    """Whether there is nothing to share out."""
    return all(len(curve.rungs) == 2 for curve in curves) and not recipe.allocation.limited


def importances(
    kind: Importance, ladders: list[Ladder], expert: Checkpoint, samples: list[Sample]
) -> list[float]:
    """What the loss of all of a matrix's delta is taken to cost.

    Weights: every matrix may lose the same share of its delta's output energy at the same price a
    weight, since a fine-tune moves each by what it needs of it. The root of energies, not energies:
    what rounding takes off the deltas points the same way in every matrix, so that amplitudes add
    up, not squares.
    """
    if kind is Importance.WEIGHTS:
        return [float(ladder.num_weights) for ladder in ladders]
    if kind is Importance.ENERGY:
        return [math.sqrt(ladder.energy) for ladder in ladders]
    felt = output_sensitivity(expert, samples[:SENSITIVITY_SAMPLES])
    unknown = [ladder.name for ladder in ladders if ladder.name not in felt]
    if unknown:
        raise ValueError(
            f"importance 'fisher' follows gradients through linears, and {unknown[0]!r} is stacked with others: "
            "set allocation.importance to weights or energy"
        )
    return [math.sqrt(ladder.energy * float(felt[ladder.name].mean())) for ladder in ladders]


def rate_curves(ladders: list[Ladder], importance: list[float]) -> list[Curve]:
    """The measured ladders as the allocators read them."""
    return [
        Curve(
            name=ladder.name,
            layer=ladder.layer,
            num_weights=ladder.num_weights,
            importance=cost,
            rungs=(Rung(0, 1.0), *map(_rung, ladder.entries)),
        )
        for ladder, cost in zip(ladders, importance, strict=True)
    ]


def _rung(entry: LinearEntry) -> Rung:
    assert entry.slot_bytes is not None
    cost = LOW_RANK_COST if _is_factored(entry) else 1.0
    return Rung(entry.bytes, entry.error * cost, entry.slot_bytes)


def _is_factored(entry: LinearEntry) -> bool:
    return isinstance(entry, FactoredEntry)


def _method(recipe: AllocationRecipe) -> str | Allocator:
    """The allocator, with a language model to propose offspring where the recipe names one."""
    if recipe.proposer is None:
        return recipe.method.value
    operator = LlmOperator(recipe.proposer.base_url, recipe.proposer.model)
    return partial(evolve, operator=operator)


def _overhead(candidates: Candidates) -> int:
    """Bytes of the weights file besides the linears' tensors, as an upper bound."""
    fixed = [weight.named_tensors() for weight in candidates.fixed]
    names = [name for tensors in fixed for name in tensors]
    for ladder in candidates.ladders:
        names += [f"{ladder.name}.{LONGEST_SUFFIX}"] * LINEAR_TENSORS
    headers = sum(len(name) + HEADER_BYTES for name in names)
    return FILE_BYTES + headers + sum(map(tensor_bytes, fixed))


def _search(
    recipe: Recipe,
    at_bits: Callable[[float], Choice],
    measured: Callable[[Choice], float],
) -> Choice:
    """The fewest bits whose measured divergence stays within the target, by bisection of log bits."""
    target = recipe.allocation.target_kl
    assert target is not None
    low, high = SEARCH_BITS
    best = at_bits(high)
    reached = measured(best)
    if reached > target:
        raise ValueError(
            f"target_kl {target:g} cannot be met: within {recipe.limiting_slot_bits:g} slot_bits the "
            f"finest rungs reach {reached:.3g} nats per token; raise the target or slot_bits, lower the "
            "embedding's step, or use --lossless"
        )
    for _ in range(SEARCH_STEPS):
        middle = (low * high) ** 0.5
        choice = at_bits(middle)
        if measured(choice) <= target:
            best, high = choice, middle
        else:
            low = middle
    return best


def _warn_of_unused(curves: list[Curve], choice: Choice, budget: int) -> None:
    """Say it where the limit in a slot is what holds the artifact's size down."""
    largest = [len(curve.rungs) - 1 for curve in curves]
    wanted = min(budget, total_bytes(curves, largest))
    found = total_bytes(curves, choice)
    if found < (1 - UNUSED_SHARE) * wanted:
        logger.warning(
            "slot_bits leave %s of the %s bytes on disk unused: raise --slot-bits to use them",
            f"{wanted - found:,}",
            f"{budget:,}",
        )
