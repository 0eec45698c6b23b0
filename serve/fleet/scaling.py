"""How many replicas a fleet wants: one more where requests wait or experts swap too much, one fewer where neither does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltamux.serve.fleet.settings import FleetSettings

# Below this share of both limits a replica can go. Chosen, so that the others stay below the limits with its load.
LITTLE = 0.25
QUEUE, SWAPS = "deltamux_queue", "deltamux_swaps_a_request"


@dataclass(frozen=True)
class Limits:
    """Where another replica is started."""

    queue: float
    swaps: float


def wanted(current: int, queues: Sequence[float], swaps: Sequence[float], limits: Limits) -> int:
    """How many replicas there should be, before bounds and delays.

    Args:
        current: How many there are.
        queues: Waiting requests of each replica.
        swaps: Swaps a request of each replica.
        limits: Where another one is started.
    """
    queue, swap = _mean(queues) / limits.queue, _mean(swaps) / limits.swaps
    if max(queue, swap) > 1:
        return current + 1
    return current - 1 if max(queue, swap) < LITTLE else current


class Policy:
    """Ray Serve's policy: asked with what the replicas report, some times a minute."""

    def __init__(self, queue: float, swaps: float) -> None:
        self._limits = Limits(queue, swaps)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and what to remember: nothing."""
        reported = context.aggregated_metrics or {}
        queues, swaps = (list(reported.get(name, {}).values()) for name in (QUEUE, SWAPS))
        return wanted(context.target_num_replicas, queues, swaps, self._limits), {}


def policy_arguments(settings: FleetSettings) -> dict[str, float]:
    """What the policy is made with."""
    return {"queue": settings.queue, "swaps": settings.swaps}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
