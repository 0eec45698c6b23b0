"""What serving experts costs, beside the ways to serve them that there are without deltamux.

    python -m benchmarks.serving [--root .demo] [--parts speed,scale]      (after `make demo`; half an hour)

speed: decoding steps and a prompt of 512 tokens as a share of plain vLLM serving one merged expert, eager and compiled;
vLLM's own LoRA at rank 16 and 64 on the same engine; an adapter of rank 16 as a deltamux expert.
scale: tokens a second of 16 requests and memory over 1 to 16 experts in one engine, beside vLLM's LoRA at both ranks, one
merged model, one vLLM process an expert, and one process that reloads checkpoints; JSON and a plot.

Every engine is a process of its own, one after the other; the merged model runs first and last, and counts by its better
run. A step is the time of 33 tokens less that of one, over 32, the median of ROUNDS.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, record

ROUNDS = 3
BATCH = 8
COUNTS = (1, 2, 4, 8, 16)
ADAPTER_COUNTS = (1, 4, 16)
PROCESSES = (1, 2, 4)
REQUESTS = 16
RANKS = (16, 64)
RUNNER = Path(__file__).with_name("serving_engine.py")
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"))
    parser.add_argument("--parts", default="speed,scale")
    options = parser.parse_args()
    bench = Bench(options.root.absolute())
    for part in options.parts.split(","):
        if part == "speed":
            record("serving", {part: bench.speed()})
            continue
        figures: Figures = {}
        try:
            bench.scale(figures)
        finally:  # what was measured is kept, whatever fails later
            record("serving-scale", {part: figures})
            plot(figures, RESULTS / "serving-scale.png")


class Bench:
    """The demo's models, and engines over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(
            path.name for path in (root / "compressed").iterdir() if not path.name.startswith(".")
        )
        self.experts = {name: str(root / "compressed" / name) for name in self.names}

    def speed(self) -> Figures:
        """Steps and prompts by engine, and their shares of the merged model's."""
        name = self.names[0]
        mixed = [self.names[i % len(self.names)] for i in range(BATCH)]
        ours: dict[str, list[str | None]] = {
            "b1 base": [None],
            "b8 base": [None] * BATCH,
            "b1": [name],
            "b8": [name] * BATCH,
            "b8 mixed": [*mixed],
        }
        plain: dict[str, list[str | None]] = {"b1": [None], "b8": [None] * BATCH}
        figures: Figures = {}
        for label, compiled in (("eager", False), ("compiled", True)):
            merged = {"model": str(self.root / "experts" / name), "compiled": compiled}
            base = {"model": str(self.root / "base"), "compiled": compiled}
            first = run({**merged, "mixes": plain})
            figures[f"deltamux {label}"] = run(
                {**base, "kind": "deltamux", "experts": self.experts, "mixes": ours}
            )
            last = run({**merged, "mixes": plain})
            figures[f"merged {label}"] = better(first, last)
        figures |= self._adapters()
        figures["shares"] = shares(figures)
        print(json.dumps(figures["shares"], indent=1))
        return figures

    def _adapters(self) -> Figures:
        """VLLM's LoRA, and the adapter of the smaller rank as an expert of deltamux."""
        folder = self.root / "adapters"
        adapters = {
            rank: {f"r{rank}-{i}": str(folder / f"r{rank}-{i}") for i in range(len(self.names))}
            for rank in RANKS
        }
        figures: Figures = {}
        for rank, experts in adapters.items():
            names = list(experts)
            mixes = {
                "b1 base": [None],
                "b8 base": [None] * BATCH,
                "b1": names[:1],
                "b8": names[:1] * BATCH,
                "b8 mixed": [names[i % len(names)] for i in range(BATCH)],
            }
            job = {"model": str(self.root / "base"), "experts": experts, "mixes": mixes}
            job |= {"compiled": False, "rank": rank, "adapters": True}
            figures[f"vLLM LoRA {rank}"] = run({**job, "kind": "lora"})
            if rank == RANKS[0]:
                figures[f"deltamux LoRA {rank}"] = run({**job, "kind": "deltamux"})
        return figures

    def scale(self, figures: Figures) -> None:
        """Throughput of 16 requests and memory, by experts; filled in as it comes."""
        folder = self.root / "adapters"
        base = str(self.root / "base")
        merged = str(self.root / "experts" / self.names[0])
        job: Figures = {"compiled": False, "mixes": {"all": [None] * REQUESTS}, "model": merged}
        figures["one merged model"] = {1: throughput(run(job))}
        paths = list(self.experts.values())
        ours = {f"e{i}": paths[i % len(paths)] for i in range(max(COUNTS))}
        job |= {"model": base, "kind": "deltamux"}
        figures["deltamux"] = {}
        for count in COUNTS:
            figures["deltamux"][count] = self._engine(job, ours, count)
        figures["a process an expert"] = self._processes()
        figures["reloading"] = run({"model": merged, "compiled": False, "reload": True})
        for rank in RANKS:
            names = [f"r{rank}-{i}" for i in range(max(COUNTS))]
            adapters = {name: str(folder / name) for name in names}
            job |= {"kind": "lora", "rank": rank, "adapters": True}
            found = figures[f"vLLM LoRA {rank}"] = {}
            for count in ADAPTER_COUNTS:
                found[count] = self._engine(job, adapters, count)

    @staticmethod
    def _engine(job: Figures, experts: dict[str, str], count: int) -> Figures:
        """One engine with the first experts, asked in turn."""
        chosen = dict(list(experts.items())[:count])
        names = list(chosen)
        mix = [names[i % count] for i in range(REQUESTS)]
        return throughput(run({**job, "experts": chosen, "slots": count, "mixes": {"all": mix}}))

    def _processes(self) -> Figures:
        """Merged models in processes of their own, all decoding at once."""
        found: Figures = {}
        for count in PROCESSES:
            mix: list[None] = [None] * (REQUESTS // count)
            jobs = [
                {
                    "model": str(self.root / "experts" / self.names[i % len(self.names)]),
                    "compiled": False,
                    "mixes": {"all": mix},
                }
                for i in range(count)
            ]
            results = run_together(jobs)
            each = [throughput(result, len(mix)) for result in results]
            found[count] = {key: sum(figures[key] for figures in each) for key in each[0]}
        return found


def throughput(result: Figures, requests: int = REQUESTS) -> Figures:
    """Tokens a second and memory of an engine that decodes so many requests at once."""
    return {
        "tokens_per_second": requests / result["steps"]["all"],
        "memory_bytes": result["memory_bytes"],
    }


def plot(figures: Figures, path: Path) -> None:
    """Tokens a second, and memory, over experts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, unit, label in (
        (panels[0], "tokens_per_second", 1, "tokens a second, 16 requests"),
        (panels[1], "memory_bytes", 2**30, "memory, GiB"),
    ):
        for name, by_count in figures.items():
            if name == "reloading":
                continue
            counts = sorted(by_count, key=int)
            values = [by_count[count][key] / unit for count in counts]
            panel.plot([int(count) for count in counts], values, marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(COUNTS, [str(count) for count in COUNTS])
        panel.set_ylim(bottom=0)
        panel.set_xlabel("experts")
        panel.set_ylabel(label)
    panels[1].legend()
    figure.savefig(path, dpi=120)


def better(first: Figures, last: Figures) -> Figures:
    """The shorter of two runs' times."""
    steps = {mix: min(spent, last["steps"][mix]) for mix, spent in first["steps"].items()}
    return {**first, "steps": steps, "prefill": min(first["prefill"], last["prefill"])}


def shares(figures: Figures) -> dict[str, dict[str, float]]:
    """Every engine's speed as a share of the merged model's, eager and compiled."""
    found: dict[str, dict[str, float]] = {}
    for engine, each in figures.items():
        for merged in ("merged eager", "merged compiled"):
            reference = figures[merged]
            row = {
                mix: round(reference["steps"][mix.split()[0]] / spent, 3)
                for mix, spent in each["steps"].items()
            }
            row["prefill"] = round(reference["prefill"] / each["prefill"], 3)
            found[f"{engine} / {merged}"] = row
    return found


def run(job: Figures) -> Figures:
    """One engine, alone."""
    return run_together([job])[0]


def run_together(jobs: list[Figures]) -> list[Figures]:
    """Several engines at once."""
    started = [
        subprocess.Popen(
            [sys.executable, str(RUNNER), json.dumps(job | {"rounds": ROUNDS})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    results = []
    for process in started:
        output, errors = process.communicate()
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(errors[-12000:])
        results.append(json.loads(lines[-1].removeprefix("RESULT ")))
    return results


if __name__ == "__main__":
    main()
