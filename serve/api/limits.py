"""How much a tenant may ask for in a minute, and at one time.

Both rates are token buckets (Turner 1986): a bucket holds what a minute allows, and fills evenly. A request takes one of
the first. Tokens are known only when an answer has ended: they are taken then, the level may fall below nought, and
no request is let in until it has risen above. The clock is the monotonic one, which nobody sets.
"""

import math
import time
from collections.abc import Callable

SECONDS = 60.0
# What a client is told to wait where the end of another request is what it waits for.
CONCURRENCY_SECONDS = 1


class Bucket:
    """A rate.

    Args:
        per_minute: What it allows, and holds when it is full.
        clock: Seconds that only go forward.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._clock = float(per_minute), clock
        self._level, self._at = self._capacity, clock()

    def seconds_until(self, level: float) -> float:
        """Seconds until it holds so much; 0.0: now."""
        now = self._clock()
        self._level += (now - self._at) * self._capacity / SECONDS
        self._level, self._at = min(self._level, self._capacity), now
        return max(0.0, level - self._level) * SECONDS / self._capacity

    def take(self, amount: float) -> None:
        """Take from it, whatever it holds."""
        self.seconds_until(0.0)
        self._level -= amount


class Limits:
    """What one tenant has left.

    Args:
        requests_per_minute: None: as many as come.
        tokens_per_minute: Of prompts and answers together; None: as many as come.
        concurrency: Requests at one time; None: as many as come.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        concurrency: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = Bucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock) if tokens_per_minute else None
        self._concurrency = concurrency
        self.running = 0

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens are limited."""
        return self._tokens is not None

    def enter(self) -> tuple[str, int] | None:
        """Let a request in; `leave` ends it.

        Returns:
            None where it is in; else what there is no more of, and the seconds until there is.
        """
        if self._concurrency is not None and self.running >= self._concurrency:
            return "concurrency", CONCURRENCY_SECONDS
        # Just above nought: a level of nought lets nobody in.
        for name, bucket, needed in (
            ("requests", self._requests, 1.0),
            ("tokens", self._tokens, 1e-9),
        ):
            wait = bucket.seconds_until(needed) if bucket else 0.0
            if wait > 1e-6:
                return name, max(1, math.ceil(wait))
        if self._requests:
            self._requests.take(1)
        self.running += 1
        return None

    def leave(self) -> None:
        """A request has ended."""
        self.running -= 1

    def spend(self, tokens: int) -> None:
        """Take the tokens of a request that has ended."""
        if self._tokens:
            self._tokens.take(tokens)
