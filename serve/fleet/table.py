"""The replicas as the front sees them: who can answer, who is asked next, who is full."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from deltamux.serve.fleet.placement import choose, order
from deltamux.serve.fleet.roster import Change


@dataclass(eq=False)
class Replica:
    """One replica.

    Attributes:
        name: Its seat.
        identity: Of the process in that seat.
        url: Its address.
        ready: Whether it is healthy and has seen all changes.
        opened: Its requests that are open.
        asked: Requests that were sent to it.
        experts: The experts it serves, once it said so.
        applied: The changes that it has seen.
        late: How often in a row it did not answer in time when it was looked at.
        gone: Set when it stops to answer.
    """

    name: str
    identity: str
    url: str
    ready: bool = False
    opened: int = 0
    asked: int = 0
    experts: frozenset[str] | None = None
    applied: dict[str, Change] = field(default_factory=dict)
    late: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Table:
    """The replicas by seat.

    Args:
        placement: "affinity" or "round_robin".
        bound: A replica's open requests, to the mean.
        room: Open requests that a replica takes in any case.
    """

    def __init__(
        self, placement: Literal["affinity", "round_robin"], bound: float, room: int
    ) -> None:
        self._by_turns = placement == "round_robin"
        self._bound, self._room = bound, room
        self._replicas: dict[str, Replica] = {}
        self._turn = 0
        # Requests that were not sent to the first replica of their expert's order: it was full.
        self.spilled = 0

    @property
    def all(self) -> list[Replica]:
        """All replicas."""
        return list(self._replicas.values())

    @property
    def ready(self) -> list[Replica]:
        """Those that can answer."""
        return [each for each in self._replicas.values() if each.ready]

    def update(self, seats: dict[str, tuple[str, str]]) -> None:
        """Take over who is there."""
        for name, replica in list(self._replicas.items()):
            if seats.get(name) != (replica.identity, replica.url):
                self.lose(replica)
                del self._replicas[name]
        for name, (identity, url) in seats.items():
            if name not in self._replicas:
                self._replicas[name] = Replica(name, identity, url)
        self._replicas = dict(sorted(self._replicas.items()))

    def lose(self, replica: Replica) -> None:
        """Ask a replica no more; what it has not begun to answer is asked of others."""
        replica.ready = False
        replica.gone.set()

    def is_expert(self, model: str) -> bool:
        """Whether a model is an expert, as far as it is known."""
        said = [each.experts for each in self.ready if each.experts is not None]
        return not said or any(model in experts for experts in said)

    def choose(self, model: str | None, tried: Collection[Replica] = ()) -> Replica | None:
        """Who answers next for a model; None: nobody is ready.

        Args:
            model: An expert, or what is answered by any replica alike.
            tried: Replicas that failed on the request.
        """
        ready = [each for each in self.ready if each not in tried]
        if not ready:
            return None
        if self._by_turns:
            self._turn += 1
            return ready[self._turn % len(ready)]
        if model is None or not self.is_expert(model):
            return min(ready, key=lambda each: each.opened)
        # The order is that of all seats: while one restarts, the others' experts stay where they are.
        names = tuple(self._replicas)
        places = {each.name: place for place, each in enumerate(ready)}
        preferred = [places[names[i]] for i in _order(model, names) if names[i] in places]
        chosen = choose(preferred, [each.opened for each in ready], self._bound, self._room)
        self.spilled += chosen != preferred[0]
        return ready[chosen]


@lru_cache(maxsize=65536)
def _order(expert: str, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(order([expert], names)[0].tolist())
