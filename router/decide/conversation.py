"""A conversation as a router reads it: the user's turns at both ends, as token ids and as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from deltamux.router.decide.config import RouterConfig
from deltamux.router.decide.features import Ids, bounded_ids
from deltamux.router.decide.tables import Floats

Turn = TypeVar("Turn")


@dataclass
class Conversation:
    """The user's turns, as a router reads them.

    Attributes:
        ids: Token ids of each turn, oldest first; none is empty.
        texts: The same turns as text; None where they are to be decoded from the ids.
        vectors: Turn to its sentence vector, as far as an encoder was asked.
    """

    ids: list[Sequence[int]]
    texts: list[str] | None = None
    vectors: dict[int, Floats] = field(default_factory=dict)


def bound(turns: Sequence[Sequence[int]], config: RouterConfig) -> Ids:
    """Return the token ids of turns together, bounded, and without unknown ones, int64 [N]."""
    return bounded_ids(turns, config.vocab_size, config.prefix_tokens, config.suffix_tokens)


def read_ends(
    turns: Sequence[Turn], read: Callable[[Turn], Sequence[int]], config: RouterConfig
) -> list[tuple[Turn, Sequence[int]]]:
    """Read turns from the end until the suffix is full, then from the start.

    Turns in the middle of a long conversation are not even tokenized, since only both ends of it
    count.

    Args:
        turns: Oldest first.
        read: A turn to its token ids.
        config: The router's, for its bounds.

    Returns:
        Turns with their ids, without those that hold no known token.
    """
    first, last = 0, len(turns)
    head: list[tuple[Turn, Sequence[int]]] = []
    tail: list[tuple[Turn, Sequence[int]]] = []
    room = config.suffix_tokens
    while first < last and room > 0:
        last -= 1
        tail.append((turns[last], read(turns[last])))
        room -= len(tail[-1][1])
    room = config.prefix_tokens
    while first < last and room > 0:
        head.append((turns[first], read(turns[first])))
        room -= len(head[-1][1])
        first += 1
    return [(turn, ids) for turn, ids in head + tail[::-1] if bound([ids], config).size]
