"""Budgets on disk and in a slot together."""

import random
from itertools import pairwise, product

import pytest

from deltamux.compression.choice.methods import ALLOCATORS, allocate
from deltamux.compression.choice.problem import (
    Curve,
    Rung,
    predicted_loss,
    total_bytes,
    total_slot_bytes,
)

METHODS = sorted(ALLOCATORS)


def make_curves(count=24, seed=0, layers=4):
    """Ladders whose rungs take a plane in a slot, then escapes too, then two planes; factors take less."""
    chance = random.Random(seed)
    curves = []
    for index in range(count):
        weights = chance.choice([1_024, 4_096])
        rungs, error = [Rung(0, 1.0)], 1.0
        for step in range(1, 7):
            error *= chance.uniform(0.3, 0.8)
            factored = chance.random() < 0.2
            slot_bits = chance.uniform(0.3, 1.0) if factored else min(4.0, 1.9 + 0.15 * step**2)
            rungs.append(Rung(step * weights // 16, error, int(weights * slot_bits / 8)))
        curves.append(Curve(f"{index}", index % layers, weights, float(weights), tuple(rungs)))
    return curves


def budgets(curves, disk_share, slot_share):
    top = [len(curve.rungs) - 1 for curve in curves]
    disk, slot = total_bytes(curves, top), total_slot_bytes(curves, top)
    return int(disk * disk_share), int(slot * slot_share)


@pytest.mark.parametrize("shares", [(0.5, 0.3), (1.0, 0.5), (0.2, 0.05), (0.9, 0.9), (1.0, 0.0)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_both_budgets(method, shares):
    curves = make_curves()
    disk, slot = budgets(curves, *shares)
    choice = allocate(method, curves, disk, None, slot)
    assert total_bytes(curves, choice) <= disk
    assert total_slot_bytes(curves, choice) <= slot


@pytest.mark.parametrize("method", METHODS)
def test_a_slot_with_room_for_all_changes_nothing(method):
    curves = make_curves()
    disk, slot = budgets(curves, 0.4, 1.0)
    assert allocate(method, curves, disk, None, slot) == allocate(method, curves, disk)


def test_more_room_in_the_slot_is_never_predicted_to_lose_much_more():
    curves = make_curves(count=60)
    losses = []
    for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        disk, slot = budgets(curves, 0.7, share)
        choice = allocate("knapsack", curves, disk, None, slot)
        losses.append(predicted_loss(curves, choice))
    assert all(more <= 1.02 * fewer for fewer, more in pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_near_the_best_of_all_choices(seed):
    curves = make_curves(count=5, seed=seed)
    disk, slot = budgets(curves, 0.6, 0.5)
    best = min(
        predicted_loss(curves, choice)
        for choice in product(*(range(len(curve.rungs)) for curve in curves))
        if total_bytes(curves, choice) <= disk and total_slot_bytes(curves, choice) <= slot
    )
    found = predicted_loss(curves, allocate("knapsack", curves, disk, None, slot))
    # Five matrices: a single rung is a large part of the budget.
    nothing = sum(curve.importance for curve in curves)
    assert found - best < 0.15 * nothing


def test_what_a_measured_objective_is_asked_fits_both_budgets_in_the_second_round():
    curves = make_curves()
    disk, slot = budgets(curves, 0.8, 0.3)
    asked = []

    def objective(choice):
        asked.append(choice)
        return predicted_loss(curves, choice)

    choice = allocate("evolution", curves, disk, objective, slot)
    assert total_slot_bytes(curves, choice) <= slot
    assert asked


def test_matrices_without_importance_take_no_room():
    curves = [*make_curves(), Curve("0", 0, 1_024, 0.0, (Rung(0, 1.0), Rung(8, 0.5, 512)))]
    disk, slot = budgets(curves, 0.9, 0.3)
    choice = allocate("knapsack", curves, disk, None, slot)
    assert total_slot_bytes(curves, choice) <= slot


def test_a_negative_budget_in_the_slot_is_refused():
    with pytest.raises(ValueError, match="'slot_bytes' must be 0 or more, got -1"):
        allocate("knapsack", make_curves(), 100, None, -1)
