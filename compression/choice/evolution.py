"""Evolutionary search for one rate per decoder layer, under a measured objective.

Self-Pruner (Huang et al. 2025, "Towards Efficient Automatic Self-Pruning of Large Language Models",
arXiv 2502.14413) evolves layer-wise pruning rates with a fixed mean: a population, tournaments,
crossover and mutation, the fitness being the pruned model's perplexity. There a language model carries
out every operation. Here choosing is ours, so that the search never gets worse and always ends, and an
`Operator` proposes the offspring: `blend`, or a language model (`llm.LlmOperator`).

A genome is one relative rate per layer, with mean 1. A common factor makes its bytes fit the budget,
a layer shares out its bytes among its matrices by the knapsack's steps, and the fill spends the rest.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from deltamux.compression.choice.knapsack import fill, hull_steps, knapsack
from deltamux.compression.choice.problem import Choice, Curve, Objective
from deltamux.compression.choice.uniform import largest_fit, uniform

# Sizes and chances of the search; chosen, not measured: what an evaluation costs bounds the first two.
POPULATION = 16
GENERATIONS = 12
ELITE = 2
TOURNAMENT = 3
MUTATED_SHARE = 0.3
MUTATION_SCALE = 0.3
# What a mutation multiplies, lest a layer that once got nothing stay without.
LEAST_RATE = 0.02


@dataclass(frozen=True)
class Candidate:
    """One member of the population.

    Attributes:
        rates: Relative bits per weight of every layer, in order of depth, with mean 1.
        choice: The rungs that the rates come to.
        loss: Objective of the choice.
    """

    rates: tuple[float, ...]
    choice: tuple[int, ...]
    loss: float


Operator = Callable[[Candidate, Candidate, random.Random], list[float]]


def blend(mother: Candidate, father: Candidate, chance: random.Random) -> list[float]:
    """Every rate of either parent, some of them multiplied by a log-normal factor."""
    rates = [chance.choice(pair) for pair in zip(mother.rates, father.rates, strict=True)]
    return [
        max(rate, LEAST_RATE) * chance.lognormvariate(0, MUTATION_SCALE)
        if chance.random() < MUTATED_SHARE
        else rate
        for rate in rates
    ]


def _loss(candidate: Candidate) -> float:
    return candidate.loss


def evolve(
    curves: Sequence[Curve],
    budget_bytes: int,
    objective: Objective,
    *,
    population: int = POPULATION,
    generations: int = GENERATIONS,
    operator: Operator = blend,
    seed: int = 0,
) -> Choice:
    """Evolve layer-wise rates; the result is never worse than `uniform` or `knapsack`.

    Args:
        curves: One per matrix, without dominated rungs.
        budget_bytes: Upper bound of the total.
        objective: What falls; asked at most `population` · (`generations` + 1) times.
        population: Candidates alive at a time, more than the elite of 2 that outlives a generation.
        generations: How often the others are replaced by offspring.
        operator: Proposes offspring of two parents, one non-negative rate per layer.
        seed: Of all chance.

    Raises:
        ValueError: The population or the number of generations is too small.
    """
    _check_sizes(population, generations)
    if not curves:
        return []
    genomes = _Genomes(curves, budget_bytes, objective)
    chance = random.Random(seed)
    starts = [uniform(curves, budget_bytes), knapsack(curves, budget_bytes)]
    alive = [genomes.born(genomes.rates(choice), choice) for choice in starts]
    while len(alive) < population:
        alive.append(genomes.born(blend(alive[0], alive[1], chance)))
    for _ in range(generations):
        parents = sorted(alive, key=_loss)
        alive = parents[:ELITE]
        while len(alive) < population:
            alive.append(genomes.born(operator(*_two_winners(parents, chance), chance)))
    return list(min(alive, key=_loss).choice)


def _check_sizes(population: int, generations: int) -> None:
    if population <= ELITE or generations < 0:
        raise ValueError(
            f"'population' must be above {ELITE} and 'generations' not negative, got {population} "
            f"and {generations}: the defaults are {POPULATION} and {GENERATIONS}"
        )


class _Genomes:
    """What layer-wise rates come to, and the reverse.

    The convex-hull steps of a layer's matrices, best gain per byte first, make the layer one ladder.
    """

    def __init__(self, curves: Sequence[Curve], budget_bytes: int, objective: Objective) -> None:
        self.objective = objective
        self.curves = curves
        self.budget_bytes = budget_bytes
        self.layers = sorted({curve.layer for curve in curves})
        self.num_weights = [
            sum(curve.num_weights for curve in curves if curve.layer == layer)
            for layer in self.layers
        ]
        ordered = hull_steps(curves)
        self.steps = [
            [step for step in ordered if curves[step.curve].layer == layer] for layer in self.layers
        ]
        self.ladders = [
            list(accumulate((step.num_bytes for step in steps), initial=0)) for steps in self.steps
        ]

    def born(self, rates: Sequence[float], choice: Choice | None = None) -> Candidate:
        """What rates come to, and its loss; `choice`, where they were taken from one."""
        choice = choice or self.decode(rates)
        return Candidate(_mean_one(rates), tuple(choice), self.objective(list(choice)))

    def decode(self, rates: Sequence[float]) -> Choice:
        shares = [n * rate for n, rate in zip(self.num_weights, rates, strict=True)]
        reached = largest_fit(self.ladders, shares, self.budget_bytes)
        choice = [0] * len(self.curves)
        for steps, count in zip(self.steps, reached, strict=True):
            for step in steps[:count]:
                choice[step.curve] = step.rung
        return fill(self.curves, choice, self.budget_bytes)

    def rates(self, choice: Choice) -> list[float]:
        """Bytes per weight of every layer."""
        num_bytes = dict.fromkeys(self.layers, 0)
        for curve, rung in zip(self.curves, choice, strict=True):
            num_bytes[curve.layer] += curve.rungs[rung].num_bytes
        return [
            num_bytes[layer] / n for layer, n in zip(self.layers, self.num_weights, strict=True)
        ]


def _mean_one(rates: Sequence[float]) -> tuple[float, ...]:
    total = sum(rates)
    return tuple(rate * len(rates) / total if total > 0 else 1.0 for rate in rates)


def _two_winners(parents: list[Candidate], chance: random.Random) -> tuple[Candidate, Candidate]:
    """The best of a few drawn at random, twice; parents are sorted by loss."""
    size = min(TOURNAMENT, len(parents))
    first, second = (min(chance.sample(range(len(parents)), size)) for _ in range(2))
    return parents[first], parents[second]
