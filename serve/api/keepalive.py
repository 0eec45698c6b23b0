"""Experts that nobody asks for leave memory after their `ttl`; they return with their next request."""

import asyncio
import time

from deltamux.serve.api.experts import ExpertRegistry

# Seconds between two looks, at most and at least.
SLOWEST, FASTEST = 10.0, 0.05


async def keep_alive(registry: ExpertRegistry) -> None:
    """Look after the experts as long as the server runs."""
    while True:
        await asyncio.sleep(interval(registry))
        for expert in list(registry):
            ttl = expert.limits.ttl
            if ttl is None or expert.pinned or expert.request is None:
                continue
            if time.monotonic() - expert.rests_since >= ttl:
                registry.rest(expert)


def interval(registry: ExpertRegistry) -> float:
    """Seconds until the next look: a quarter of the shortest `ttl`."""
    shortest = min((each.limits.ttl for each in registry if each.limits.ttl), default=SLOWEST)
    return min(max(shortest / 4, FASTEST), SLOWEST)
