"""Prometheus metrics, in the default registry, so that vLLM's `/metrics` shows them.

Labels take configured names only: an expert's name or `base`, a router's domain, a reason of
`deltamux.router.decision`; never a client's text. Latencies are measured where vLLM measures its own:
two methods of `IterationStats` are wrapped, which see every request's expert, streaming or not.
"""

import inspect
import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import REGISTRY, Collector

from deltamux.compression.artifact import deltamux_version
from deltamux.serve import compat
from deltamux.serve.experts import ExpertRegistry
from deltamux.serve.settings import BASE
from deltamux.serve.status import SWAP_BUCKETS, WorkerStatus, read_status
from deltamux.serve.store import public_name

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
ITL_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300)
ROUTER_BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1)
CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
TIERS = ("slot", "host", "disk")

requests_total = Counter("deltamux_requests", "Requests by who answers.", ["expert", "reason"])
tokens_total = Counter("deltamux_tokens", "Tokens in and out.", ["expert", "kind"])
ttft_seconds = Histogram(
    "deltamux_ttft_seconds", "Time to first token.", ["expert"], buckets=TTFT_BUCKETS
)
itl_seconds = Histogram(
    "deltamux_itl_seconds", "Time between tokens.", ["expert"], buckets=ITL_BUCKETS
)
e2e_seconds = Histogram(
    "deltamux_e2e_seconds", "Arrival to last token.", ["expert"], buckets=E2E_BUCKETS
)
router_decisions = Counter("deltamux_router_decisions", "Routed requests.", ["domain", "reason"])
router_seconds = Histogram(
    "deltamux_router_seconds", "Time to decide, with tokenization.", buckets=ROUTER_BUCKETS
)
router_confidence = Histogram(
    "deltamux_router_confidence", "Confidence of decisions.", buckets=CONFIDENCE_BUCKETS
)
build_info = Gauge("deltamux_build_info", "Versions.", ["version", "vllm_version"])


def install(registry: ExpertRegistry, kv_cache_bytes: Callable[[], int]) -> None:
    """Start measuring: wrap vLLM's statistics, and export what the worker publishes."""
    build_info.labels(deltamux_version(), str(compat.vllm_version())).set(1)
    _wrap_statistics()
    REGISTRY.register(WorkerCollector(registry, kv_cache_bytes))


def expert_label(lora_name: str | None) -> str:
    """The value of the label `expert`."""
    return BASE if lora_name is None else public_name(lora_name)


def _wrap_statistics() -> None:
    """Observe per expert what vLLM's statistics observe in sum."""
    stats: Any = compat.symbol(compat.STATS_MODULE, compat.STATS_NAME)
    if hasattr(stats.update_from_output, "deltamux"):
        return
    on_output, on_finished = (getattr(stats, name) for name in compat.STATS_METHODS)
    # Releases differ in the order of these arguments, not in their names.
    names = list(inspect.signature(on_output).parameters)

    def update_from_output(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        req_stats, output = given["req_stats"], given["output"]
        label = expert_label(given["lora_name"])
        # The finished request's statistics carry no name: leave it on the object they share.
        req_stats.deltamux_expert = label
        last = req_stats.last_token_ts
        on_output(*args, **kwargs)
        if given["is_prefilling"]:
            ttft_seconds.labels(label).observe(req_stats.first_token_latency)
        else:
            itl_seconds.labels(label).observe(given["engine_core_timestamp"] - last)
        tokens_total.labels(label, "generated").inc(len(output.new_token_ids))

    def update_from_finished_request(self: Any, *args: Any, **kwargs: Any) -> None:
        on_finished(self, *args, **kwargs)
        label = getattr(kwargs.get("req_stats"), "deltamux_expert", None)
        if label is not None:
            tokens_total.labels(label, "prompt").inc(kwargs["num_prompt_tokens"])
            e2e_seconds.labels(label).observe(time.time() - kwargs["req_stats"].arrival_time)

    update_from_output.deltamux = True  # type: ignore[attr-defined]
    stats.update_from_output = update_from_output
    stats.update_from_finished_request = update_from_finished_request


class WorkerCollector(Collector):
    """Residency, swaps and memory, read at each scrape."""

    def __init__(self, registry: ExpertRegistry, kv_cache_bytes: Callable[[], int]) -> None:
        self._registry = registry
        self._kv_cache_bytes = kv_cache_bytes

    def describe(self) -> list[Any]:
        """Nothing: `collect` must not run when the collector is registered."""
        return []

    def collect(self) -> Iterable[Any]:
        """All families."""
        status = read_status()
        yield from self._experts(status)
        yield _swap_seconds(status)
        evictions = CounterMetricFamily("deltamux_evictions", "Experts that lost their slot.")
        evictions.add_metric([], status.evictions)
        yield evictions
        yield self._memory(status)

    def _experts(self, status: WorkerStatus) -> Iterable[Any]:
        swaps = CounterMetricFamily(
            "deltamux_swaps", "Moves into a tier.", labels=["expert", "tier"]
        )
        resident = GaugeMetricFamily(
            "deltamux_expert_resident", "1 where an expert is.", labels=["expert", "tier"]
        )
        size = GaugeMetricFamily(
            "deltamux_expert_bytes", "Bytes of the compressed expert.", labels=["expert"]
        )
        for expert in self._registry:
            seen = expert.request and status.experts.get(expert.request.lora_int_id)
            size.add_metric([expert.name], expert.num_bytes)
            for tier in TIERS:
                here = float(tier == (seen.tier if seen else "disk"))
                resident.add_metric([expert.name, tier], here)
            for tier in TIERS[:2]:
                count = status.swaps.get(expert.name, {}).get(tier, 0)
                swaps.add_metric([expert.name, tier], count)
        yield from (swaps, resident, size)

    def _memory(self, status: WorkerStatus) -> Any:
        memory = GaugeMetricFamily("deltamux_memory_bytes", "Memory by kind.", labels=["kind"])
        for kind, value in status.memory_bytes.items():
            memory.add_metric([kind], value)
        memory.add_metric(["kv_cache"], self._kv_cache_bytes())
        memory.add_metric(["process"], _resident_bytes())
        return memory


def _swap_seconds(status: WorkerStatus) -> Any:
    family = HistogramMetricFamily(
        "deltamux_swap_seconds", "Time of a move into a tier.", labels=["tier"]
    )
    for tier, histogram in status.swap_seconds.items():
        total, buckets = 0, []
        for bound, count in zip((*SWAP_BUCKETS, "+Inf"), histogram.counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family.add_metric([tier], buckets, sum_value=histogram.sum)
    return family


def _resident_bytes() -> int:
    """Resident memory of this process and its children (engine and worker)."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
