"""Residency under vLLM's names for adapters, which routers in front of several servers read.

`vllm:lora_requests_info` names adapters that have requests; vLLM would name experts by their versions there, and would
not know of requests that wait at the gate. The gauges of what is loaded are those that vLLM plans (its pull requests
45411 and 54830); where a release has them already, its own are left alone.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from deltamux.serve import compat
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.names import public_name

LOADED = "vllm:lora_adapter_loaded"
LEVELS = {"slot": "gpu", "host": "cpu"}


def loaded_adapters(registry: ExpertRegistry) -> Iterator[GaugeMetricFamily]:
    """One series for each expert in a slot (level `gpu`, whatever the device) or in host memory (`cpu`)."""
    if compat.tells_loaded_adapters(LOADED):
        return
    loaded = GaugeMetricFamily(
        LOADED,
        "1 for each loaded adapter, by where it is.",
        labels=["engine", "adapter_name", "level", "pinned"],
    )
    counts = dict.fromkeys(LEVELS.values(), 0)
    for expert in registry:
        seen = registry.status_of(expert)
        level = LEVELS.get(seen.tier)
        if level is not None:
            loaded.add_metric(["0", expert.name, level, str(seen.pinned).lower()], 1)
            counts[level] += 1
        # An adapter on the device counts for the host as well where a copy is there.
        counts["cpu"] += level == "gpu" and seen.host_bytes > 0
    yield loaded
    for level, count in counts.items():
        family = GaugeMetricFamily(
            f"vllm:num_{level}_loaded_lora_adapters",
            f"Adapters that are loaded on the {level} level.",
            labels=["engine"],
        )
        family.add_metric(["0"], count)
        yield family


def name_publicly(registry: ExpertRegistry) -> None:
    """Let `vllm:lora_requests_info` name experts as clients do, those that wait at the gate included."""
    states: Any = compat.symbol(*compat.LORA_STATES)
    if not hasattr(states.update_scheduler_stats, "deltamux"):
        states.update_scheduler_stats = _publicly(states.update_scheduler_stats, registry)


def _publicly(update: Callable[..., None], registry: ExpertRegistry) -> Callable[..., None]:
    signature = inspect.signature(update)

    def updated(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        stats = signature.bind(*args, **kwargs).arguments["scheduler_stats"]
        if stats is None:
            return
        stats.running_lora_adapters = _summed(stats.running_lora_adapters)
        waiting = _summed(stats.waiting_lora_adapters)
        for name, count in registry.gate.waiting().items():
            waiting[name] = waiting.get(name, 0) + count
        stats.waiting_lora_adapters = waiting

    updated.deltamux = True  # type: ignore[attr-defined]
    return updated


def _summed(counts: dict[str, int]) -> dict[str, int]:
    """Versions of an expert under its one name; those without a request are left out."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        if count:
            found[public_name(name)] = found.get(public_name(name), 0) + count
    return found
