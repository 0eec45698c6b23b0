"""Gaps between the tokens of running requests while other experts come into slots.

The engine runs in this process. Eight requests of eight experts decode; every few steps a request
arrives: of an expert that has a slot, of one that is brought into a slot beside the steps first, as
deltamux's server does, or of one that a step itself has to bring in.
"""

import statistics
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import numpy as np

from benchmarks.gpu_engine_worker import manager_of
from deltamux.serve.worker.residency import Wanted

OTHERS = 8
STEPS, EVERY = 120, 12


def swap_gaps(engine: Any, requests: list[Any], vocabulary: int) -> dict[str, dict[str, float]]:
    """Seconds between tokens: median, 99th percentile and longest, by who arrives.

    Args:
        engine: vLLM's `LLM`, with its core in this process.
        requests: LoRA requests; the first eight decode, the second eight have slots, the rest do not.
        vocabulary: Token ids of prompts are below it.
    """
    (manager,) = engine.collective_rpc(manager_of)
    traffic = _Traffic(engine.llm_engine, manager.residency, vocabulary)
    running, resident = requests[:OTHERS], requests[OTHERS : 2 * OTHERS]
    absent = requests[2 * OTHERS :]
    found = {}
    for name, arrivals, aside in (
        ("nobody arrives", [], False),
        ("of resident experts", resident, False),
        ("of experts brought in beside", absent, True),
        ("of experts that a step brings in", absent, False),
    ):
        for _ in range(2):  # the first run warms up
            gaps = traffic.run(running, arrivals, STEPS, aside)
            # What entered has to be out again.
            traffic.run(resident, [], 1, False)
        found[name] = {
            "median": statistics.median(gaps),
            "p99": float(np.percentile(gaps, 99)),
            "longest": max(gaps),
        }
    return found


class _Traffic:
    """Requests to an engine whose steps are taken one by one."""

    def __init__(self, engine: Any, residency: Any, vocabulary: int) -> None:
        self._engine, self._residency, self._vocabulary = engine, residency, vocabulary
        self._rng = np.random.default_rng(2)
        self._sent = 0
        self._entering: list[tuple[Any, Thread]] = []

    def run(self, running: list[Any], arrivals: list[Any], steps: int, aside: bool) -> list[float]:
        """Seconds of the steps in which `running` decode, after their prompts.

        Args:
            running: Experts of the requests that decode.
            arrivals: Experts of those that come meanwhile.
            steps: How many.
            aside: Whether their experts are brought into slots before they are sent.
        """
        for request in running:
            self._send(request, steps + 2)
        for _ in range(2):
            self._engine.step()
        keep = [request.lora_int_id for request in running]
        coming = iter(arrivals)
        gaps = [self._step(step, coming, keep, aside) for step in range(steps)]
        while self._engine.has_unfinished_requests() or self._entering:
            self._admit()
            self._engine.step()
        return gaps

    def _step(self, step: int, coming: Iterator[Any], keep: list[int], aside: bool) -> float:
        start = time.perf_counter()
        if step % EVERY == EVERY // 2 and (request := next(coming, None)):
            if aside:
                wanted = Wanted(request.lora_int_id, request.lora_name, request.lora_path)
                self._residency.need([*keep, wanted.expert_id], self._sent)
                thread = Thread(target=self._residency.enter, args=(wanted,))
                thread.start()
                self._entering.append((request, thread))
            else:
                self._send(request, 4)
        self._admit()
        self._engine.step()
        return time.perf_counter() - start

    def _admit(self) -> None:
        """Send the requests whose experts have entered."""
        for entry in [each for each in self._entering if not each[1].is_alive()]:
            self._entering.remove(entry)
            self._send(entry[0], 4)

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
