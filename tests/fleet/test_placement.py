"""Rendezvous hashing with a bound: stable, even, and nobody is overrun."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltamux.serve.fleet.placement import choose, most_requests, order

EXPERTS = [f"expert-{number}" for number in range(4000)]
REPLICAS = [f"replica-{number}" for number in range(8)]


def test_experts_are_spread_evenly_and_names_alone_decide() -> None:
    first = order(EXPERTS, REPLICAS)
    homes = np.bincount(first[:, 0], minlength=len(REPLICAS))
    assert homes.min() > 0.85 * homes.mean()
    assert homes.max() < 1.15 * homes.mean()
    alone = order(EXPERTS[7:8], REPLICAS)[0]
    assert alone.tolist() == first[7].tolist()
    assert sorted(alone) == list(range(len(REPLICAS)))


def test_a_replica_that_goes_moves_only_its_own_experts() -> None:
    before, after = order(EXPERTS, REPLICAS), order(EXPERTS, REPLICAS[:-1])
    stayed = before[:, 0] != len(REPLICAS) - 1
    assert (before[stayed, 0] == after[stayed, 0]).all()
    # Those that move go to the replica that was next for them.
    assert (before[~stayed, 1] == after[~stayed, 0]).all()


def test_a_replica_with_twice_the_slots_is_home_to_twice_the_experts() -> None:
    homes = Counter(order(EXPERTS, ["small", "large"], [4, 8])[:, 0].tolist())
    assert 1.8 < homes[1] / homes[0] < 2.2


@given(
    loads=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    bound=st.floats(1.0, 3.0),
    room=st.integers(1, 8),
)
def test_there_is_always_room_and_it_is_the_first(
    loads: list[int], bound: float, room: int
) -> None:
    preferred = list(range(len(loads)))
    chosen = choose(preferred, loads, bound, room)
    most = most_requests(sum(loads) + 1, len(loads), bound, room)
    assert loads[chosen] < most
    assert all(load >= most for load in loads[:chosen])


def test_no_names_have_no_order() -> None:
    assert order([], REPLICAS).shape == (0, len(REPLICAS))
    assert order(EXPERTS[:3], []).shape == (3, 0)
