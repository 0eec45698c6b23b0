"""Which replica answers for an expert: rendezvous hashing with a bound on the load.

Every pair of an expert and a replica has a score that follows from their names alone. An expert's order of replicas is that
of its scores, so that whoever knows the names knows the order, and a replica that comes or goes moves only the experts
that are at home there. A request goes to the first replica of its expert's order that is not full. A replica is full when it
has more than its share of the open requests: `bound` times the mean, but never fewer than `room`, since an engine computes a
few requests together as fast as one.

The planner (`simulation.py`) and the fleet's front (`table.py`) both place by this module.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

# A replica may have so many times the mean of open requests. Chosen; `deltamux plan` shows what others cost.
DEFAULT_BOUND = 1.25
# Open requests that a replica takes in any case. Measured on two small replicas (`benchmarks/fleet.py`): with 4, four of
# ten requests were sent away from their expert, and a request cost as many swaps as by turns.
DEFAULT_ROOM = 8

# Of splitmix64, which makes all bits of a number depend on each of them.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Hashes = NDArray[np.uint64]
Places = NDArray[np.int32]


def order(
    experts: Sequence[str], replicas: Sequence[str], weights: Sequence[float] | None = None
) -> Places:
    """The order in which each expert prefers the replicas.

    Args:
        experts: Names.
        replicas: Names.
        weights: How many experts should be at home at each replica, relative to the others; None: equally many.

    Returns:
        A row of indices of replicas for each expert, the preferred one first.
    """
    if not experts or not replicas:
        return np.zeros((len(experts), len(replicas)), np.int32)
    mine, theirs = _hashes(experts), _mixed(_hashes(replicas))
    weight = np.ones(len(replicas)) if weights is None else np.asarray(weights, float)
    rows = []
    for part in np.array_split(mine, max(1, len(mine) // 1024)):
        mixed = _mixed(part[:, None] ^ theirs[None, :])
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        # The least of exponential variables of these rates is the replica's with probability weight / sum of weights.
        rows.append(np.argsort(-np.log(uniform) / weight, axis=1, kind="stable").astype(np.int32))
    return np.concatenate(rows)


def most_requests(
    opened: int, replicas: int, bound: float = DEFAULT_BOUND, room: int = DEFAULT_ROOM
) -> int:
    """How many requests a replica may have, of so many that are open in all."""
    return max(room, math.ceil(bound * opened / replicas))


def choose(
    preferred: Sequence[int],
    loads: Sequence[int],
    bound: float = DEFAULT_BOUND,
    room: int = DEFAULT_ROOM,
) -> int:
    """The replica for one more request.

    Args:
        preferred: Indices of the replicas that can answer, in the expert's order; not empty.
        loads: Open requests, by index.
        bound: See above; at least 1, so that somebody has room.
        room: See above.
    """
    opened = sum(loads[index] for index in preferred)
    most = most_requests(opened + 1, len(preferred), bound, room)
    return next(index for index in preferred if loads[index] < most)


def _hashes(names: Sequence[str]) -> Hashes:
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """Splitmix64 of each."""
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
