"""The metrics that are read at each scrape: residency, swaps, memory, requests in flight.

The worker's own counts come from its status file. Whatever cannot be read is left out of the page,
with a line in the log: a scrape must not fail for one figure.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import REGISTRY, Collector

from deltamux.compression.artifact.manifest import deltamux_version
from deltamux.serve import compat
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.names import BASE
from deltamux.serve.observability import adapters, engine_stats, metrics
from deltamux.serve.observability.journal import Journal
from deltamux.serve.observability.memory import Memory
from deltamux.serve.status import SWAP_BUCKETS, WorkerStatus, read_status

logger = logging.getLogger("vllm.deltamux")

TIERS = ("slot", "host", "disk")


@dataclass(frozen=True)
class Sources:
    """Where the figures come from."""

    registry: ExpertRegistry
    journal: Journal
    memory: Memory
    speculative: bool = False


def install(sources: Sources) -> None:
    """Start measuring."""
    metrics.build_info.labels(deltamux_version(), str(compat.vllm_version())).set(1)
    engine_stats.install(sources.speculative)
    adapters.name_publicly(sources.registry)
    REGISTRY.register(ServerCollector(sources))


class ServerCollector(Collector):
    """What `/metrics` shows beside the counters of events."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._reported: set[str] = set()

    def describe(self) -> list[Any]:
        """Nothing: `collect` must not run when the collector is registered."""
        return []

    def collect(self) -> Iterable[Any]:
        """All families that can be read."""
        for family in (_experts, _adapters, _swaps, _memory, _in_flight):
            yield from self._readable(family)

    def _readable(self, family: Callable[[Sources, WorkerStatus], Iterable[Any]]) -> list[Any]:
        try:
            return list(family(self._sources, read_status()))
        except Exception:
            if family.__name__ not in self._reported:
                self._reported.add(family.__name__)
                logger.exception("deltamux: /metrics lacks what %s reads", family.__name__)
            return []


def _experts(sources: Sources, status: WorkerStatus) -> Iterator[Any]:
    swaps = CounterMetricFamily("deltamux_swaps", "Moves into a tier.", labels=["expert", "tier"])
    resident = GaugeMetricFamily(
        "deltamux_expert_resident", "1 where an expert is.", labels=["expert", "tier"]
    )
    size = GaugeMetricFamily(
        "deltamux_expert_bytes", "Bytes of the compressed expert.", labels=["expert"]
    )
    for expert in list(sources.registry):
        here = sources.registry.status_of(expert).tier
        size.add_metric([expert.name], expert.num_bytes)
        for tier in TIERS:
            resident.add_metric([expert.name, tier], float(tier == here))
        for tier in TIERS[:2]:
            count = status.swaps.get(expert.name, {}).get(tier, 0)
            swaps.add_metric([expert.name, tier], count)
    yield from (swaps, resident, size)


def _adapters(sources: Sources, _: WorkerStatus) -> Iterator[Any]:
    return adapters.loaded_adapters(sources.registry)


def _swaps(_: Sources, status: WorkerStatus) -> Iterator[Any]:
    family = HistogramMetricFamily(
        "deltamux_swap_seconds", "Time of a move into a tier.", labels=["tier"]
    )
    for tier, histogram in status.swap_seconds.items():
        total, buckets = 0, []
        for bound, count in zip((*SWAP_BUCKETS, "+Inf"), histogram.counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family.add_metric([tier], buckets, sum_value=histogram.sum)
    yield family
    evictions = CounterMetricFamily("deltamux_evictions", "Experts that lost their slot.")
    evictions.add_metric([], status.evictions)
    stalls = CounterMetricFamily(
        "deltamux_step_stalls",
        "Experts that a step waited for: they were not in a slot when it began.",
    )
    stalls.add_metric([], status.stalls)
    yield from (evictions, stalls)


def _memory(sources: Sources, status: WorkerStatus) -> Iterator[Any]:
    reported = sources.memory.reported()
    kinds = GaugeMetricFamily(
        "deltamux_memory_bytes", "Memory by kind; the kinds add up.", labels=["kind"]
    )
    for kind, value in sources.memory.by_kind(status.memory_bytes, reported).items():
        kinds.add_metric([kind], value)
    used = GaugeMetricFamily(
        "deltamux_memory_used_bytes",
        "What the operating system and the device report as used.",
        labels=["place"],
    )
    limit = GaugeMetricFamily(
        "deltamux_memory_limit_bytes", "What the server may use at most.", labels=["place"]
    )
    for place, figures in reported.items():
        used.add_metric([place], figures.used)
        limit.add_metric([place], figures.limit)
    yield from (kinds, used, limit)


def _in_flight(sources: Sources, _: WorkerStatus) -> Iterator[Any]:
    family = GaugeMetricFamily(
        "deltamux_requests_in_flight",
        "Open requests: waiting for their first token, or running.",
        labels=["expert", "state"],
    )
    idle = dict.fromkeys([BASE, *(expert.name for expert in sources.registry)], (0, 0))
    for expert, (waiting, running) in (idle | sources.journal.in_flight()).items():
        family.add_metric([expert, "waiting"], waiting)
        family.add_metric([expert, "running"], running)
    yield family
