"""Gaps between the tokens of running requests while other experts come into slots.

The engine runs in this process. Eight requests of eight experts decode; every few steps a request
arrives: of an expert that has a slot, or of one that has to get one first.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

OTHERS = 8
STEPS, EVERY = 120, 12


def swap_gaps(engine: Any, requests: list[Any], vocabulary: int) -> dict[str, dict[str, float]]:
    """Seconds between tokens: median, 99th percentile and longest, by who arrives.

    Args:
        engine: vLLM's `LLM`, with its core in this process.
        requests: LoRA requests; the first eight decode, the second eight have slots, the rest do not.
        vocabulary: Token ids of prompts are below it.
    """
    traffic = _Traffic(engine.llm_engine, vocabulary)
    resident, absent = requests[OTHERS : 2 * OTHERS], requests[2 * OTHERS :]
    found = {}
    for name, arrivals in (
        ("nobody arrives", []),
        ("of resident experts", resident),
        ("of experts that enter a slot", absent),
    ):
        for _ in range(2):  # the first run warms up
            gaps = traffic.run(requests[:OTHERS], arrivals, STEPS)
            # What entered has to be out again.
            traffic.run(resident, [], 1)
        found[name] = {
            "median": statistics.median(gaps),
            "p99": float(np.percentile(gaps, 99)),
            "longest": max(gaps),
        }
    return found


class _Traffic:
    """Requests to an engine whose steps are taken one by one."""

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._rng = np.random.default_rng(2)
        self._sent = 0

    def run(self, running: list[Any], arrivals: list[Any], steps: int) -> list[float]:
        """Seconds of the steps in which `running` decode, after their prompts."""
        for request in running:
            self._send(request, steps + 2)
        for _ in range(2):
            self._engine.step()
        coming = iter(arrivals)
        gaps = [self._step(step, coming) for step in range(steps)]
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return gaps

    def _step(self, step: int, coming: Iterator[Any]) -> float:
        start = time.perf_counter()
        if step % EVERY == EVERY // 2 and (request := next(coming, None)):
            self._send(request, 4)
        self._engine.step()
        return time.perf_counter() - start

    def _send(self, request: Any, tokens: int) -> None:
        from vllm import SamplingParams

        self._sent += 1
        ids = self._rng.integers(3, self._vocabulary, 16).tolist()
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        prompt: Any = {"prompt_token_ids": ids}
        self._engine.add_request(f"swap-{self._sent}", prompt, sampling, lora_request=request)


def table(gaps: dict[str, dict[str, float]]) -> None:
    print(f"{'gaps between tokens, ms':32}{'median':>9}{'p99':>9}{'longest':>9}")
    for name, each in gaps.items():
        print(f"{name:32}" + "".join(f"{value * 1e3:9.1f}" for value in each.values()))
