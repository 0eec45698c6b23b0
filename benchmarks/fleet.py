"""A fleet of two CPU replicas: swaps a request by affinity and round robin, throughput, and a replica killed under load.

    python -m benchmarks.fleet [--experts 12] [--slots 4] [--requests 400]      (needs `deltamux[fleet]`)
    python -m benchmarks.fleet --plan      the planner's figures alone, and their plot

The base and its experts are tiny and random: what is measured is where requests go, not how fast a model is. The same trace
(Zipf, exponent 1) goes to a fleet that places by affinity and to one that takes turns; the planner's simulation of it stands
beside. Then the same load runs again, and one server is killed with SIGKILL in its middle.
"""

import argparse
import json
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

import httpx
import numpy as np
import psutil
import yaml

from benchmarks.fleet_site import COMMAND, ENVIRONMENT, build
from benchmarks.record import RESULTS, record
from deltamux.serve.fleet.plan import PlanSettings, simulate
from deltamux.serve.fleet.simulation import draw, zipf

REPLICAS, WORKERS, TOKENS, PORT = 2, 8, 8, 8937
START_SECONDS = 600.0
PLANS = [(100, (2, 4, 8, 16)), (1_000, (2, 8, 32, 128)), (10_000, (10, 100, 1_000))]
SERVER = "vllm.entrypoints"
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    result: Figures = {"planned": planned()}
    plot(result["planned"], RESULTS / "fleet.png")
    if not options.plan:
        with tempfile.TemporaryDirectory() as scratch:
            result |= measured(Path(scratch), options.experts, options.slots, options.requests)
    record("fleet", result)


def planned() -> list[Figures]:
    """What the planner says of fleets up to 10,000 experts and 1,000 replicas."""
    found = []
    for experts, counts in PLANS:
        for replicas in counts:
            settings = PlanSettings(experts=experts, replicas=(replicas,), slots=(8,))
            start = time.monotonic()
            outcome = simulate(settings, settings.fleets()[0])
            found.append(
                {
                    "experts": experts,
                    "replicas": replicas,
                    "slots": 8,
                    "affinity": outcome.affinity,
                    "round_robin": outcome.round_robin,
                    "busiest": outcome.busiest,
                    "seconds": time.monotonic() - start,
                }
            )
    return found


def measured(folder: Path, experts: int, slots: int, requests: int) -> Figures:
    """The same trace through both placements, and through a fleet that loses a server."""
    names = build(folder, experts, slots)
    trace = [names[i] for i in draw(zipf(experts, 1.0), requests, seed=1)]
    found: Figures = {"experts": experts, "slots": slots, "requests": requests}
    for placement in ("round_robin", "affinity"):
        with fleet(folder, placement) as process:
            found[placement] = load(trace)
            print(json.dumps({placement: found[placement]}))
            if placement == "affinity":
                found["killed"] = load(trace, kill=process)
                found["killed"]["back_after_seconds"] = until_ready()
    settings = PlanSettings(
        experts=experts, replicas=(REPLICAS,), slots=(slots,), concurrency=WORKERS // REPLICAS
    )
    outcome = simulate(settings, settings.fleets()[0])
    found["simulated"] = {"affinity": outcome.affinity, "round_robin": outcome.round_robin}
    return found


@contextmanager
def fleet(folder: Path, placement: str) -> Iterator[Popen[bytes]]:
    """A running fleet."""
    path = folder / "fleet.yaml"
    content = {"server": "deltamux.yaml", "replicas": REPLICAS, "port": PORT}
    path.write_text(yaml.safe_dump(content | {"placement": placement}))
    log = (folder / f"{placement}.log").open("wb")
    process = Popen(
        [*COMMAND, "fleet", str(path)], stdout=log, stderr=STDOUT, env=ENVIRONMENT, cwd=folder
    )
    try:
        until_ready(process)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def until_ready(process: Popen[bytes] | None = None) -> float:
    """Seconds until all replicas can answer."""
    start = time.monotonic()
    while time.monotonic() - start < START_SECONDS:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the fleet ended with {process.returncode}")
        try:
            said = httpx.get(f"http://127.0.0.1:{PORT}/v1/ready", timeout=10).json()
            if sum(said["replicas"].values()) == REPLICAS:
                return time.monotonic() - start
        except (httpx.TransportError, ValueError, KeyError):
            pass
        time.sleep(0.5)
    raise RuntimeError("the fleet was not ready")


def load(trace: list[str], kill: Popen[bytes] | None = None) -> Figures:
    """Send a trace, as many requests at one time as there are workers; kill a server in its middle."""
    before, answers = figures(), Counter[str]()
    start = time.monotonic()
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as client:

        def ask(expert: str) -> float:
            began = time.monotonic()
            asked = {"model": expert, "prompt": "hello", "max_tokens": TOKENS, "ignore_eos": True}
            try:
                said = client.post("/v1/completions", json=asked)
                right = said.status_code == httpx.codes.OK and said.json()["model"] == expert
                answers["answered" if right else f"status {said.status_code}"] += 1
            except httpx.TransportError as error:
                answers[type(error).__name__] += 1
            return time.monotonic() - began

        with ThreadPoolExecutor(WORKERS) as pool:
            waits = [pool.submit(ask, expert) for expert in trace]
            if kill is not None:
                waits[len(trace) // 3].result()
                kill_one(kill)
            seconds = [each.result() for each in waits]
    took = time.monotonic() - start
    found = {
        "answers": dict(answers),
        "requests_per_second": len(trace) / took,
        "median_seconds": float(np.median(seconds)),
        "p99_seconds": float(np.quantile(seconds, 0.99)),
    }
    after = figures()
    if kill is None:
        found["swaps_per_request"] = (after["swaps"] - before["swaps"]) / len(trace)
    return found | {"retries": after["retries"] - before["retries"], "spilled": after["spilled"]}


def kill_one(process: Popen[bytes]) -> None:
    """SIGKILL to one server of the fleet."""
    servers = [
        each
        for each in psutil.Process(process.pid).children(recursive=True)
        if SERVER in " ".join(each.cmdline())
    ]
    servers[0].kill()


def figures() -> dict[str, float]:
    """Moves into slots, and the front's counts, over all replicas."""
    found: Counter[str] = Counter()
    page = httpx.get(f"http://127.0.0.1:{PORT}/metrics", timeout=60).text
    for line in page.splitlines():
        value = line.rpartition(" ")[2]
        if line.startswith("deltamux_swaps_total") and 'tier="slot"' in line:
            found["swaps"] += float(value)  # type: ignore[assignment]
        elif named := re.match(r"deltamux_fleet_(retries|spilled)_total ", line):
            found[named[1]] += float(value)  # type: ignore[assignment]
    return dict(found)


def plot(rows: list[Figures], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for place, (experts, _) in enumerate(PLANS):
        of_count = [row for row in rows if row["experts"] == experts]
        x = [row["replicas"] for row in of_count]
        label = f"{experts:,} experts"
        axes.plot(x, [r["affinity"] for r in of_count], f"C{place}o-", label=f"{label}, affinity")
        axes.plot(
            x, [r["round_robin"] for r in of_count], f"C{place}x--", label=f"{label}, round robin"
        )
    axes.set(xscale="log", xlabel="replicas of 8 slots", ylabel="swaps a request", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
