"""Experts that come and go while tokens flow (after `make demo`; parts run for two to eight minutes each).

    python -m benchmarks.swap [--root .demo] [--parts gaps,ttft,copy,fits,flood,zipf]

gaps: gaps between tokens of running requests while experts of others are loaded from disk, beside the same requests for
an expert that is in a slot; windows alternate in one server.
ttft: first token of an expert that is on disk, in host memory, in a slot, one after the other.
copy: host → slot against a plain copy of the same bytes.
fits: swaps and stalls of a load over as many experts as there are slots.
flood: the longest wait of an expert that is asked for while others are flooded.
zipf: one trace over 16 experts: 4 slots, the same with images kept on disk, all resident, 4 slots without the gate
(plain LRU: a step loads what it lacks), and vLLM's own LoRA with adapters of equal bytes.

The parts of a run are kept in one file; parts that are not asked for are taken over from the day's file.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import RESULTS, keep
from benchmarks.serving_engine import save_adapter
from benchmarks.swap_load import replay, zipf_trace
from benchmarks.swap_scenes import flood_of, gaps_of, quantile, spread, ttft_of
from deltamux.serve.demo.load import Scrape
from deltamux.serve.demo.server import Server, deltamux_serve, running_server

WINDOWS = 8
PATIENCE = 2.0
EXPERTS, REQUESTS = 16, 100
Figures = dict[str, Any]


class Bench:
    """The demo's base and experts, and servers over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = sorted(each for each in (root / "compressed").iterdir() if each.is_dir())
        self.folder = Path(tempfile.mkdtemp(prefix="deltamux-swap-"))

    @contextmanager
    def server(
        self, count: int, gate: bool = True, **settings: Any
    ) -> Iterator[tuple[Server, list[str]]]:
        """A server with so many experts: the demo's, in turn, under names of their own."""
        names = [f"e{i}" for i in range(count)]
        experts = [
            {"name": name, "path": str(self.paths[i % len(self.paths)])}
            for i, name in enumerate(names)
        ]
        content = {"base": {"model": str(self.root / "base")}, "experts": experts, "engine": ENGINE}
        config = self.folder / "deltamux.yaml"
        config.write_text(yaml.safe_dump(content | settings))
        command = deltamux_serve(config)
        if not gate:
            command = [sys.executable, "-m", "benchmarks.swap_plain", str(config)]
        with running_server(command, self.folder / "server.log", ENVIRONMENT) as server:
            yield server, names

    def gaps(self) -> Figures:
        """Gaps of running requests, quiet and while others are loaded."""
        # One image fits: each of the two that alternate comes from disk.
        with self.server(3, slots=2, host_cache="1MB") as (server, names):
            asyncio.run(gaps_of(server.url, names, windows=2))
            quiet, loud, loads = asyncio.run(gaps_of(server.url, names, WINDOWS))
            moved = Scrape(server.url)
        step = statistics.median(quiet)
        return {
            "loads_from_disk": loads,
            "step_seconds": step,
            "quiet": spread(quiet),
            "while_loading": spread(loud),
            "p99_ratio": quantile(loud, 0.99) / quantile(quiet, 0.99),
            "longest_in_steps": max(loud) / step,
            "stalls": moved.total("deltamux_step_stalls_total"),
            "gaps": {"quiet": quiet, "while_loading": loud},
        }

    def ttft(self) -> Figures:
        """First tokens by where the expert was."""
        found: Figures = {}
        for tier, cache in (("disk", "1MB"), ("host", "2GiB")):
            with self.server(3, slots=2, host_cache=cache) as (server, names):
                found[tier] = asyncio.run(ttft_of(server.url, names))
        return found

    def copy(self) -> Figures:
        """A copy into a slot, and a plain one."""
        import torch

        from deltamux.compression.checkpoint.architecture import tensor_specs
        from deltamux.compression.checkpoint.checkpoint import open_checkpoint
        from deltamux.compression.image.source import open_source
        from deltamux.serve.worker.decoder import shared
        from deltamux.serve.worker.loader import _mapped
        from deltamux.serve.worker.slots import Slots

        torch.set_num_threads(1)
        base = open_checkpoint(str(self.root / "base"))
        shapes = {s.name: base.shape(s.name) for s in tensor_specs(base.config, set(base.files))}
        plain = open_source(self.paths[0], 64).image(shapes)
        image = _mapped(shared(plain), plain.numel(), False)
        slots = Slots(2, plain.numel(), list(shapes), torch.device("cpu"))
        target = torch.zeros_like(plain)
        ours, plains = [], []
        for _ in range(64):
            start = time.perf_counter()
            target.copy_(plain)
            middle = time.perf_counter()
            slots.load_aside(0, image, None)
            ours.append(time.perf_counter() - middle)
            plains.append(middle - start)
        seconds, reference = statistics.median(ours), statistics.median(plains)
        return {
            "bytes": plain.numel(),
            "slot_seconds": seconds,
            "copy_seconds": reference,
            "ratio": seconds / reference,
        }

    def fits(self) -> Figures:
        """What a working set that fits still moves."""
        with self.server(2, slots=2) as (server, names):
            trace = zipf_trace(2, 24, 2.0)
            asyncio.run(replay(server.url, trace, names))
            before = Scrape(server.url)
            asyncio.run(replay(server.url, zipf_trace(2, 60, 2.0, seed=1), names))
            after = Scrape(server.url)

        def grown(name: str, **labels: str) -> float:
            return after.total(name, **labels) - before.total(name, **labels)

        return {
            "activations": grown("deltamux_swaps_total", tier="slot"),
            "stalls": grown("deltamux_step_stalls_total"),
        }

    def flood(self) -> Figures:
        """How long a cold expert waits under a flood."""
        with self.server(3, slots=2, slot_wait=PATIENCE) as (server, names):
            waits, longest = asyncio.run(flood_of(server.url, names))
        return {
            "patience_seconds": PATIENCE,
            "longest_request_seconds": longest,
            "waits_seconds": waits,
            "longest_wait_seconds": max(waits),
            "bar_seconds": PATIENCE + longest,
        }

    def zipf(self) -> Figures:
        """One trace on every server."""
        found: Figures = {}
        kinds: dict[str, tuple[bool, dict[str, Any]]] = {
            "four slots": (True, {"slots": 4}),
            "four slots, image cache": (True, {"slots": 4, "image_cache": "4GiB"}),
            "all resident": (True, {"slots": EXPERTS}),
            "plain LRU": (False, {"slots": 4}),
        }
        for label, (gate, settings) in kinds.items():
            with self.server(EXPERTS, gate, host_cache="320MB", **settings) as (server, names):
                found[label] = self._replayed(server, names)
        with self.adapters() as (server, names):
            found["vLLM LoRA"] = self._replayed(server, names)
        ours, all_resident = found["four slots"], found["all resident"]
        found["throughput_ratio"] = ours["tokens_per_second"] / all_resident["tokens_per_second"]
        return found

    def _replayed(self, server: Server, names: list[str]) -> Figures:
        asyncio.run(replay(server.url, zipf_trace(len(names), 24, 4.0, seed=7), names))
        trace = zipf_trace(len(names), REQUESTS, RATE)
        start = time.monotonic()
        answers = asyncio.run(replay(server.url, trace, names))
        seconds = time.monotonic() - start
        scrape = Scrape(server.url)
        return {
            "seconds": seconds,
            "tokens_per_second": sum(len(each.tokens) for each in answers) / seconds,
            "ttft": spread([each.ttft for each in answers]),
            "gaps": spread([gap for each in answers for _, gap in each.gaps]),
            "stalls": scrape.total("deltamux_step_stalls_total"),
            "swaps": {
                tier: scrape.total("deltamux_swaps_total", tier=tier) for tier in ("host", "slot")
            },
            "ttfts": [each.ttft for each in answers],
        }

    @contextmanager
    def adapters(self) -> Iterator[tuple[Server, list[str]]]:
        """VLLM's own LoRA: adapters whose bytes are those of an image, as many slots."""
        folders = [self.root / "adapters" / f"r64-{i}" for i in range(len(self.paths))]
        for seed, folder in enumerate(folders):
            save_adapter(self.root / "base", folder, 64, seed)
        names = [f"e{i}" for i in range(EXPERTS)]
        modules = [f"{name}={folders[i % len(folders)]}" for i, name in enumerate(names)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.root / "base"), "--enable-lora", "--max-loras", "4"]
        command += ["--max-cpu-loras", "8", "--max-lora-rank", "64", "--lora-modules", *modules]
        for key, value in ENGINE.items():
            flag = f"--{key.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
        environment = ENVIRONMENT | {"VLLM_PLUGINS": ""}
        with running_server(command, self.folder / "lora.log", environment) as server:
            yield server, names


ENGINE = {
    "served_model_name": "base",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**29,
}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# Requests a second. Chosen: near what two cores serve.
RATE = 4.0


def plot(result: Figures, path: Path) -> None:
    """Distributions: gaps by window, first tokens of the trace by server."""
    import matplotlib.pyplot as plt

    shown = [part for part in ("gaps", "zipf") if part in result]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False)
    for part, axis in zip(shown, axes[0], strict=True):
        if part == "gaps":
            for label, values in result["gaps"]["gaps"].items():
                _curve(axis, values, label.replace("_", " "))
            axis.axvline(3e3 * result["gaps"]["step_seconds"], color="grey", linestyle=":")
            axis.set_title("gaps of running requests (dotted: 3 steps)")
        else:
            for label, found in result["zipf"].items():
                if isinstance(found, dict):
                    _curve(axis, found["ttfts"], label)
            axis.set_title("first tokens, Zipf trace over 16 experts")
        axis.set(xlabel="ms", ylabel="share of gaps or requests above", yscale="log", xscale="log")
        axis.set_xlim(left=10)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _curve(axis: Any, values: list[float], label: str) -> None:
    ordered = sorted(values)
    above = [1 - i / len(ordered) for i in range(len(ordered))]
    axis.step([1e3 * each for each in ordered], above, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"))
    parser.add_argument("--parts", default="gaps,ttft,copy,fits,flood,zipf")
    options = parser.parse_args()
    bench = Bench(options.root.absolute())
    today = sorted(RESULTS.glob(f"swap_*_{time.strftime('%Y-%m-%d', time.gmtime())}.json"))
    result: Figures = json.loads(today[-1].read_text())["result"] if today else {}
    for part in options.parts.split(","):
        result[part] = getattr(bench, part)()
        shown = {k: v for k, v in result[part].items() if k != "gaps" or part != "gaps"}
        print(part, json.dumps(shown, indent=1, default=str)[:3000])
        path, content = keep("swap", result)
    plot(result, RESULTS / "swap.png")
    print(f"wrote {path}")
    print(json.dumps(content)[:2000])


if __name__ == "__main__":
    main()
