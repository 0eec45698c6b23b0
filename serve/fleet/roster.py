"""Which replicas there are, and what clients changed on them: the one memory of a fleet.

A replica joins under a *seat*: a name that a replica started in its place takes over, so that experts stay where they
are placed. It must join again every few seconds; who does not is forgotten. Changes (an expert added, removed, pinned;
a router reloaded) are kept by what they change, so that a replica that starts later is brought to the same state.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

# Seconds after which a replica that has not joined again is forgotten. One that ends gives its seat up, and whether it answers
# the front sees for itself: this is for replicas whose machine has gone. A busy machine is late by some seconds.
LEASE_SECONDS = 60.0


@dataclass(frozen=True)
class Change:
    """A request that every replica must see.

    Attributes:
        key: What it changes; a later change of the same replaces it.
        method: HTTP's.
        path: The route.
        body: JSON, or nothing.
    """

    key: str
    method: str
    path: str
    body: Any = None


@dataclass
class Seat:
    """A replica that is there."""

    identity: str
    url: str
    until: float


@dataclass(frozen=True)
class Known:
    """What a roster knows: replicas' identities and addresses by seat, and changes, the oldest first."""

    seats: dict[str, tuple[str, str]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


class RosterClient(Protocol):
    """A roster from where the front is: here, or in another process."""

    async def known(self) -> Known:
        """What is known now."""

    async def note(self, change: Change) -> None:
        """Keep a change."""


class Roster:
    """The roster itself.

    Args:
        state: Where changes are kept over a restart; None: nowhere.
    """

    def __init__(self, state: Path | None = None) -> None:
        self._seats: dict[str, Seat] = {}
        self._state = state
        self._changes: dict[str, Change] = {}
        if state is not None and state.is_file():
            for content in json.loads(state.read_text()):
                change = Change(**content)
                self._changes[change.key] = change

    def join(self, identity: str, url: str) -> str:
        """Take a seat, or keep it; the seat's name."""
        self._expire()
        until = time.monotonic() + LEASE_SECONDS
        for name, seat in self._seats.items():
            if seat.identity == identity:
                seat.until = until
                return name
        number = 0
        while (name := f"replica-{number}") in self._seats:
            number += 1
        self._seats[name] = Seat(identity, url, until)
        return name

    def leave(self, identity: str) -> None:
        """Give a seat up."""
        self._seats = {n: seat for n, seat in self._seats.items() if seat.identity != identity}

    def known(self) -> Known:
        """What is known now."""
        self._expire()
        seats = {name: (seat.identity, seat.url) for name, seat in sorted(self._seats.items())}
        return Known(seats, list(self._changes.values()))

    def note(self, change: Change) -> None:
        """Keep a change; one of an expert itself replaces that of its pin."""
        kind, _, name = change.key.partition(":")
        if kind == "expert":
            self._changes.pop(f"pin:{name}", None)
        self._changes.pop(change.key, None)
        self._changes[change.key] = change
        if self._state is not None:
            scratch = self._state.with_suffix(".new")
            scratch.write_text(json.dumps([asdict(each) for each in self._changes.values()]))
            scratch.replace(self._state)

    def _expire(self) -> None:
        now = time.monotonic()
        self._seats = {name: seat for name, seat in self._seats.items() if seat.until > now}
