"""Minutes of mixed load on one server: whether an answer is ever wrong, and whether memory or descriptors grow.

    python -m benchmarks.soak [--root .demo] [--minutes 20]      (after `make demo`)

The demo's experts, a LoRA adapter where there is one, and an expert that is updated all the time share two slots and a host
cache that holds one of them, so that most swaps come from disk. Workers ask in turn for everything, whole or as a
stream; some leave in the middle. Before the load, every question is asked alone: an answer is right if it has the
same tokens, or first differs where the two likeliest tokens were closer than TIE (float32; a batch rounds in another order).
Memory is the resident memory of the server's processes, together and each, its slope a line of least squares behind the first
quarter.
"""

import argparse
import json
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml

from benchmarks.record import record
from deltamux.serve.demo.server import Server, deltamux_serve, running_server

WORKERS = 6
TOKENS = 24
# Nats. Sums of float32 in another order differ by some 1e-5 of them.
TIE = 1e-3
SAMPLE_SECONDS = 5.0
UPDATE_SECONDS = 7.0
CANCELLED = 0.15
# By a word of the command line; the first that occurs.
KINDS = {
    "worker.decoder": "decoder",
    "VLLM::Worker": "worker",
    "EngineCore": "engine core",
    "resource_tracker": "tracker",
}
SERVER = "API server"
PROMPTS = (
    "Natalia sold 48 clips in April and half as many in May. How many did she sell?",
    "What is 17 times 23?",
    "SELECT the names of all customers who live in Berlin",
    "How many rows has the table orders?",
    "list all files that were changed today",
    "show the disk usage of each directory here",
    "Tell me a story about a lighthouse.",
    "What should I cook tonight?",
)
# Updated all the time, between these two.
ROTATING, VERSIONS = "rotating", ("math", "sql")
Answer = list[tuple[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"))
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = configuration(options.root.absolute(), Path(scratch))
        with running_server(deltamux_serve(config), Path(scratch) / "server.log") as server:
            soak = Soak(server, Path(scratch))
            result = soak.run(60 * options.minutes)
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    record("soak", result)


def configuration(root: Path, folder: Path) -> Path:
    """A server's configuration over copies of the demo's experts."""
    names = sorted(path.name for path in (root / "compressed").glob("[!.]*"))
    for name in names:
        shutil.copytree(root / "compressed" / name, folder / name)
    if (root / "adapters" / "r16-0").is_dir():
        shutil.copytree(root / "adapters" / "r16-0", folder / "adapter")
        names.append("adapter")
    for version in VERSIONS:
        shutil.copytree(folder / version, folder / f"{ROTATING}-{version}")
    content = {
        "base": {"model": str(root / "base")},
        "experts": [{"name": name, "path": name} for name in names]
        + [{"name": ROTATING, "path": f"{ROTATING}-{VERSIONS[0]}"}],
        "router": {"path": str(root / "router")},
        "slots": 2,
        "host_cache": "1MB",
        "engine": {
            "served_model_name": "base-model",
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": WORKERS,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**28,
        },
    }
    path = folder / "deltamux.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Soak:
    """The load, and what is seen of it.

    Args:
        server: The running server.
        folder: Where its experts lie.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.samples: list[dict[str, float]] = []
        self.alone: dict[tuple[str, str], list[Answer]] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()

    def run(self, seconds: float) -> dict[str, Any]:
        """Ask alone, then under load for so long."""
        models = [each["id"] for each in httpx.get(f"{self.server.url}/v1/models").json()["data"]]
        models.remove("auto")
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            self._ask_alone(client, models)
        workers = [
            threading.Thread(target=self._work, args=(seed, models)) for seed in range(WORKERS)
        ]
        others = [threading.Thread(target=each) for each in (self._update, self._watch)]
        start = time.monotonic()
        for thread in (*workers, *others):
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in (*workers, *others):
            thread.join()
        return self._result(time.monotonic() - start)

    def _ask_alone(self, client: httpx.Client, models: list[str]) -> None:
        for model in models:
            if model != ROTATING:
                for prompt in PROMPTS:
                    self.alone[model, prompt] = [self._ask(client, model, prompt)]
        for prompt in PROMPTS:
            self.alone[ROTATING, prompt] = [
                *self.alone[VERSIONS[0], prompt],
                *self.alone[VERSIONS[1], prompt],
            ]

    def _ask(self, client: httpx.Client, model: str, prompt: str) -> Answer:
        """Tokens, each with how much likelier it was than the next one."""
        answer = client.post("/v1/completions", json=body(model, prompt))
        answer.raise_for_status()
        found = answer.json()["choices"][0]["logprobs"]
        return list(
            zip(map(token_id, found["tokens"]), map(gap, found["top_logprobs"]), strict=True)
        )

    def _work(self, seed: int, models: list[str]) -> None:
        chosen = random.Random(seed)
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            while not self._stop.is_set():
                model, prompt = chosen.choice(models), chosen.choice(PROMPTS)
                try:
                    if chosen.random() < CANCELLED:
                        self._leave(client, model, prompt)
                    else:
                        self._check(model, prompt, self._ask(client, model, prompt))
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self._count(f"error: {type(error).__name__}: {error}"[:120])

    def _leave(self, client: httpx.Client, model: str, prompt: str) -> None:
        """Read the beginning of an answer."""
        asked = body(model, prompt) | {"stream": True, "max_tokens": 200, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=asked) as stream:
            next(stream.iter_lines(), None)
        self._count("cancelled")

    def _check(self, model: str, prompt: str, answer: Answer) -> None:
        verdicts = [verdict(alone, answer) for alone in self.alone[model, prompt]]
        best = min(verdicts, key=("same", "tie", "wrong").index)
        self._count(best)
        if best == "wrong":
            with self._lock:
                self.wrong.append({"model": model, "prompt": prompt, "answer": answer})

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _update(self) -> None:
        """Load the other version under the same name, again and again."""
        number = 0
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            while not self._stop.wait(UPDATE_SECONDS):
                number += 1
                path = self.folder / f"{ROTATING}-{VERSIONS[number % 2]}"
                asked = {"name": ROTATING, "path": str(path)}
                status = client.post("/v1/experts", json=asked).status_code
                self._count("updated" if status == httpx.codes.CREATED else f"update: {status}")

    def _watch(self) -> None:
        start = time.monotonic()
        root = psutil.Process(self.server.process.pid)
        while not self._stop.wait(SAMPLE_SECONDS):
            processes = [root, *root.children(recursive=True)]
            sizes = [each.memory_info().rss / 1e6 for each in processes]
            kinds = [kind_of(each) for each in processes]
            by_kind: dict[str, float] = Counter()
            for kind, size in zip(kinds, sizes, strict=True):
                by_kind[f"rss_mb of {kind}"] += size
            self.samples.append(
                {
                    "seconds": time.monotonic() - start,
                    "rss_mb": sum(sizes),
                    "descriptors": sum(each.num_fds() for each in processes),
                }
                | by_kind
            )

    def _result(self, seconds: float) -> dict[str, Any]:
        page = httpx.get(f"{self.server.url}/metrics").text
        swaps: Counter[str] = Counter()
        for line in page.splitlines():
            if line.startswith("deltamux_swaps_total"):
                tier = line.partition('tier="')[2].partition('"')[0]
                swaps[tier] += int(float(line.rpartition(" ")[2]))
        answered = sum(self.counts[each] for each in ("same", "tie", "wrong"))
        return {
            "seconds": seconds,
            "answers": answered,
            "wrong_answers": self.wrong,
            "counts": dict(self.counts),
            "loads_from_disk": swaps["host"],
            "moves_into_slots": swaps["slot"],
            "rss_mb_per_minute": slope(self.samples, "rss_mb"),
            "rss_mb_per_minute_by_process": {
                kind: slope(self.samples, f"rss_mb of {kind}") for kind in (*KINDS.values(), SERVER)
            },
            "descriptors_per_minute": slope(self.samples, "descriptors"),
            "healthy": httpx.get(f"{self.server.url}/health").status_code == httpx.codes.OK,
            "samples": self.samples,
        }


def kind_of(process: psutil.Process) -> str:
    """Which of the server's processes one is."""
    words = " ".join([process.name(), *process.cmdline()])
    return next((kind for word, kind in KINDS.items() if word in words), SERVER)


def body(model: str, prompt: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
    }


def token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def gap(likeliest: dict[str, float]) -> float:
    """How much likelier the likeliest token was than the next."""
    first, second = sorted(likeliest.values(), reverse=True)[:2]
    return first - second


def verdict(alone: Answer, answer: Answer) -> str:
    """Whether an answer is the one that was given alone."""
    for (expected, closeness), (found, _) in zip(alone, answer, strict=False):
        if expected != found:
            return "tie" if closeness < TIE else "wrong"
    return "same" if len(alone) == len(answer) else "wrong"


def slope(samples: list[dict[str, float]], key: str) -> dict[str, float]:
    """A line through what was sampled behind the first quarter: per minute, and its standard error."""
    kept = samples[len(samples) // 4 :]
    minutes = np.array([each["seconds"] for each in kept]) / 60
    values = np.array([each.get(key, 0.0) for each in kept])
    (rate, level), covariance = np.polyfit(minutes, values, 1, cov=True)
    return {
        "per_minute": float(rate),
        "standard_error": float(np.sqrt(covariance[0, 0])),
        "level": float(level),
    }


if __name__ == "__main__":
    main()
