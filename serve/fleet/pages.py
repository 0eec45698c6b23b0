"""What all replicas say, as one: `/metrics` with a label, `/v1/experts` with the residency by replica."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

COUNTED = {
    "retries": "Requests that were sent again to another replica.",
    "failed": "Requests that no replica answered.",
    "broken": "Streams that ended in the middle, with their replica.",
    "spilled": "Requests that their expert's first replica was too full for.",
}
TIERS = ("slot", "host", "disk")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?(.*)", re.S)


def labelled(pages: dict[str, str]) -> str:
    """Pages of metrics as one, each sample with the label `replica`.

    Args:
        pages: By replica, in Prometheus' text format.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ")[2]
                head = heads.setdefault(family, [])
                if line not in head and not any(_kind(line) == _kind(each) for each in head):
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_with_label(line, replica))
    lines = [line for family in samples for line in (*heads.get(family, []), *samples[family])]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class OwnMetrics(Collector):
    """The front's own figures.

    Attributes:
        counts: "retries", "failed", "broken" and "spilled".
        asked: Requests that were sent, by replica.
        ready: The replicas that can answer.
    """

    counts: dict[str, int]
    asked: dict[str, int]
    ready: Collection[str]

    def collect(self) -> Iterator[Metric]:
        """The families, as Prometheus' client asks for them."""
        ready = GaugeMetricFamily(
            "deltamux_fleet_ready", "1 where a replica can answer.", labels=["replica"]
        )
        sent = CounterMetricFamily(
            "deltamux_fleet_sent", "Requests sent to a replica.", labels=["replica"]
        )
        for name, count in self.asked.items():
            ready.add_metric([name], name in self.ready)
            sent.add_metric([name], count)
        yield from (ready, sent)
        for name, said in COUNTED.items():
            yield CounterMetricFamily(f"deltamux_fleet_{name}", said, self.counts.get(name, 0))


def all_experts(pages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Lists of experts as one.

    Args:
        pages: `GET /v1/experts` by replica.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for replica, page in pages.items():
        for expert in page["data"]:
            found.setdefault(expert["id"], {})[replica] = expert
    slots = {replica: page["slots"] for replica, page in pages.items()}
    data = [one_expert(each) for each in found.values()]
    return {"object": "list", "data": data, "slots": sum(slots.values()), "replicas": slots}


def one_expert(told: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """An expert as all replicas tell it: the fastest tier, the sums of its requests, and where it is.

    Args:
        told: `GET /v1/experts/{name}` by replica.
    """
    each = list(told.values())
    first = min(each, key=lambda one: TIERS.index(one["tier"]))
    merged = dict(first)
    for key in ("running", "waiting"):
        merged[key] = sum(one[key] for one in each)
    merged["pinned"] = any(one["pinned"] for one in each)
    merged["last_used"] = max((one["last_used"] or 0.0 for one in each), default=0.0) or None
    merged["error"] = next((one["error"] for one in each if one["error"]), None)
    shown = ("tier", "slot", "pinned", "running", "waiting", "content", "error")
    merged["replicas"] = {name: {key: one[key] for key in shown} for name, one in told.items()}
    return merged


def _kind(line: str) -> str:
    return line.split(" ")[1]


def _with_label(line: str, replica: str) -> str:
    found = _SAMPLE.match(line)
    if found is None:
        return line
    name, labels, rest = found.groups()
    said = f"replica={json.dumps(replica)}"
    if not labels:
        return f"{name}{{{said}}}{rest}"
    comma = "" if rest.startswith("}") else ","
    return f"{name}{{{said}{comma}{rest}"
