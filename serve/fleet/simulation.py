"""A trace of requests over a fleet that exists on paper: where each goes, and which of them cost a swap.

Requests come in waves. The requests of a wave are open at one time, `concurrency` of them for each replica, and are
placed as the fleet's front places them (`placement.py`). Then every replica keeps the experts that it used last, as many as it
has slots. That is a little worse than our server, which lets requests of one expert go together before it swaps.

All waves are placed at once, and all replicas are stepped through at once: a trace of half a million requests over
10,000 experts and 1,000 replicas takes seconds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltamux.serve.fleet.placement import DEFAULT_BOUND, DEFAULT_ROOM, Places, most_requests

# Of a trace, the beginning, in which slots fill; it is not counted. Chosen.
WARM_UP = 0.25
NOTHING, CLOSED = -1, -2

Shares = NDArray[np.float64]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Load:
    """How requests come and are bounded.

    Attributes:
        concurrency: Requests that are open at one time, for each replica.
        bound: A replica's open requests, to the mean.
        room: Open requests that a replica takes in any case.
    """

    concurrency: int = 8
    bound: float = DEFAULT_BOUND
    room: int = DEFAULT_ROOM


def zipf(experts: int, exponent: float) -> Shares:
    """The share of each expert's requests, where the n-th has 1 / n^exponent of the first one's."""
    weights = 1.0 / np.arange(1, experts + 1) ** exponent
    return np.asarray(weights / weights.sum())


def draw(shares: Shares, requests: int, seed: int = 0) -> Numbers:
    """A trace: the expert of each request."""
    chosen = np.random.default_rng(seed).choice(len(shares), requests, p=shares)
    return np.asarray(chosen, np.int64)


def by_affinity(trace: Numbers, preferred: Places, load: Load) -> Numbers:
    """The replica of each request, as the fleet's front chooses it.

    Args:
        trace: The expert of each request.
        preferred: Each expert's order of replicas.
        load: What bounds a replica.
    """
    replicas = preferred.shape[1]
    opened = load.concurrency * replicas
    wave = np.arange(len(trace)) // opened
    most = most_requests(opened, replicas, load.bound, load.room)
    taken = np.zeros((wave[-1] + 1) * replicas, np.int64)
    chosen = np.full(len(trace), NOTHING, np.int64)
    waiting = np.arange(len(trace))
    for rank in range(replicas):
        place = preferred[trace[waiting], rank].astype(np.int64)
        cell = wave[waiting] * replicas + place
        fits = taken[cell] + _number_within(cell) < most
        chosen[waiting[fits]] = place[fits]
        taken += np.bincount(cell[fits], minlength=len(taken))
        waiting = waiting[~fits]
        if not len(waiting):
            break
    return chosen


def by_turns(requests: int, replicas: int) -> Numbers:
    """The replica of each request, round robin."""
    return np.arange(requests) % replicas


def swaps(trace: Numbers, chosen: Numbers, slots: Numbers) -> Flags:
    """Which requests find their expert in no slot of their replica.

    Args:
        trace: The expert of each request.
        chosen: The replica of each request.
        slots: Of each replica.
    """
    replicas, width = len(slots), int(slots.max())
    number = _number_within(chosen)
    steps = int(number.max()) + 1
    table = np.full((steps, replicas), NOTHING, np.int64)
    table[number, chosen] = trace
    held = np.full((replicas, width), NOTHING, np.int64)
    used = np.full((replicas, width), -1, np.int64)
    closed = np.arange(width) >= slots[:, None]
    held[closed], used[closed] = CLOSED, steps
    missed = np.zeros((steps, replicas), bool)
    rows = np.arange(replicas)
    for step, asked in enumerate(table):
        there = held == asked[:, None]
        hit = there.any(axis=1)
        active = asked != NOTHING
        missed[step] = active & ~hit
        slot = np.where(hit, there.argmax(axis=1), used.argmin(axis=1))
        row, column = rows[active], slot[active]
        held[row, column] = asked[active]
        used[row, column] = step
    return np.asarray(missed[number, chosen])


def counted(flags: Flags) -> float:
    """The share of requests that cost a swap, once the slots were filled."""
    return float(flags[int(WARM_UP * len(flags)) :].mean())


def _number_within(groups: Numbers) -> Numbers:
    """The how many-th of its group each element is, from 0."""
    by_group = np.argsort(groups, kind="stable")
    ordered = groups[by_group]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    number = np.empty(len(groups), np.int64)
    number[by_group] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return number
