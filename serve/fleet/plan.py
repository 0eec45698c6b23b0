"""The planner: which experts go where, how many replicas and slots they need, and what swaps a request then costs.

Nothing is served: a trace that follows the experts' traffic is placed on each fleet that comes into question
(`simulation.py`), once by affinity and once round robin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from deltamux.serve.fleet.placement import DEFAULT_BOUND, DEFAULT_ROOM, order
from deltamux.serve.fleet.simulation import (
    Load,
    Numbers,
    Shares,
    by_affinity,
    by_turns,
    counted,
    draw,
    swaps,
    zipf,
)
from deltamux.serve.fleet.yaml_files import loaded

WHAT = "a plan"
MOST_EXPERTS, MOST_REPLICAS = 10_000, 1_000
# Requests of a trace: for each replica, and in all. Chosen: the figures move by about a hundredth between seeds.
REQUESTS_EACH, MOST_REQUESTS = 5_000, 500_000
LEAST_REQUESTS = 20_000

Count = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedExpert(_Model):
    """An expert: its name, its bytes in a slot, and its requests in any unit; None: by the Zipf exponent."""

    name: str
    bytes: ByteSize = ByteSize(0)
    requests: Annotated[float, Field(ge=0)] | None = None


class Card(_Model):
    """A card, or a replica on several: its name and its slots."""

    name: str
    slots: Count


class PlanSettings(_Model):
    """What is planned for.

    Attributes:
        experts: The experts, or only how many.
        zipf: The exponent, where requests are not given.
        cards: The fleet that there is; None: one of `replicas` by `slots` is to be found.
        replicas: How many replicas come into question.
        slots: How many slots of a replica come into question.
        concurrency: Open requests for each replica.
        bound: A replica's open requests, to the mean.
        room: Open requests that a replica takes in any case.
        swaps: How many swaps a request may cost.
        seed: Of the trace.
    """

    experts: Annotated[int, Field(ge=1, le=MOST_EXPERTS)] | tuple[PlannedExpert, ...] = 100
    zipf: Annotated[float, Field(ge=0)] = 1.0
    cards: tuple[Card, ...] | None = None
    replicas: tuple[Annotated[int, Field(ge=1, le=MOST_REPLICAS)], ...] = (1, 2, 4, 8)
    slots: tuple[Count, ...] = (4, 8, 16)
    concurrency: Count = 8
    bound: Annotated[float, Field(ge=1)] = DEFAULT_BOUND
    room: Count = DEFAULT_ROOM
    swaps: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "PlanSettings":
        if not isinstance(self.experts, int):
            given = [each.requests is not None for each in self.experts]
            if any(given) and not all(given):
                raise ValueError("give the requests of every expert, or of none")
            if not given or (all(given) and not sum(each.requests or 0 for each in self.experts)):
                raise ValueError("there is no expert with requests")
            _check_names("expert", [each.name for each in self.experts], MOST_EXPERTS)
        if self.cards is not None:
            _check_names("card", [each.name for each in self.cards], MOST_REPLICAS)
        return self

    @property
    def load(self) -> Load:
        """How requests come and are bounded."""
        return Load(self.concurrency, self.bound, self.room)

    def catalogue(self) -> tuple[list[str], Shares, Numbers]:
        """The experts' names, shares of the traffic and bytes."""
        if isinstance(self.experts, int):
            names = [f"expert-{number}" for number in range(1, self.experts + 1)]
            return names, zipf(self.experts, self.zipf), np.zeros(self.experts, np.int64)
        names = [each.name for each in self.experts]
        sizes = np.array([int(each.bytes) for each in self.experts], np.int64)
        asked = np.array([each.requests or 0.0 for each in self.experts])
        if not asked.sum():
            return names, zipf(len(names), self.zipf), sizes
        return names, asked / asked.sum(), sizes

    def fleets(self) -> list[list[Card]]:
        """The fleets that come into question, those with fewer cards and slots first."""
        if self.cards is not None:
            return [list(self.cards)]
        return [
            # Called as the fleet's seats are, so that experts are placed as there.
            [Card(name=f"replica-{number}", slots=slots) for number in range(replicas)]
            for replicas in sorted(self.replicas)
            for slots in sorted(self.slots)
        ]


def _check_names(kind: str, names: list[str], most: int) -> None:
    if not 1 <= len(names) <= most:
        raise ValueError(f"a plan has 1 to {most:,} {kind}s, got {len(names):,}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the {kind} {twice!r} is given twice")


@dataclass(frozen=True)
class Outcome:
    """What a fleet would do.

    Attributes:
        cards: The fleet.
        affinity: Swaps a request, placed by affinity.
        round_robin: Swaps a request, placed round robin.
        moved: Bytes that a request moves into slots on average, placed by affinity.
        busiest: The busiest replica's requests, to the mean.
        homes: For each expert its replicas, the one with most of its requests first.
        held: Bytes of the experts that each replica answers for: what its host cache should hold.
    """

    cards: list[Card]
    affinity: float
    round_robin: float
    moved: float
    busiest: float
    homes: list[list[int]]
    held: list[int]


def load_plan(path: Path) -> PlanSettings:
    """Read a plan; raises as `loaded`."""
    return loaded(PlanSettings, path, WHAT)


def simulate(settings: PlanSettings, cards: Sequence[Card]) -> Outcome:
    """What one fleet would do with the traffic."""
    names, shares, sizes = settings.catalogue()
    slots = np.array([card.slots for card in cards], np.int64)
    preferred = order(names, [card.name for card in cards], slots.tolist())
    requests = max(LEAST_REQUESTS, min(REQUESTS_EACH * len(cards), MOST_REQUESTS))
    trace = draw(shares, requests, settings.seed)
    chosen = by_affinity(trace, preferred, settings.load)
    missed = swaps(trace, chosen, slots)
    in_turns = swaps(trace, by_turns(requests, len(cards)), slots)
    homes = _homes(trace, chosen, preferred)
    held = np.zeros(len(cards), np.int64)
    for expert, replicas in enumerate(homes):
        held[replicas] += sizes[expert]
    counts = np.bincount(chosen, minlength=len(cards))
    moved = missed * sizes[trace]
    return Outcome(
        list(cards),
        counted(missed),
        counted(in_turns),
        float(moved[len(moved) // 4 :].mean()),
        float(counts.max() / counts.mean()),
        homes,
        held.tolist(),
    )


def best(outcomes: Sequence[Outcome], most_swaps: float) -> Outcome | None:
    """The first fleet that costs no more swaps than wanted; None: there is none."""
    return next((each for each in outcomes if each.affinity <= most_swaps), None)


def _homes(trace: Numbers, chosen: Numbers, preferred: np.ndarray) -> list[list[int]]:
    """Each expert's replicas by its requests there; where it had none, the one that it prefers."""
    replicas = preferred.shape[1]
    pairs, counts = np.unique(trace * replicas + chosen, return_counts=True)
    homes: list[list[int]] = [[] for _ in preferred]
    for pair in pairs[np.argsort(-counts, kind="stable")]:
        homes[pair // replicas].append(int(pair % replicas))
    return [found or [int(first)] for found, first in zip(homes, preferred[:, 0], strict=True)]
