"""What `swap.py` plays to its servers: running requests beside loads, first tokens by tier, a flood."""

import asyncio
import statistics
import time
from typing import Any

from benchmarks.swap_load import Answer, client, stream

WINDOW_SECONDS = 6.0
ROUNDS = 8
Figures = dict[str, Any]


async def gaps_of(url: str, names: list[str], windows: int) -> tuple[list[float], list[float], int]:
    """Gaps of two streams of the first expert, by whether requests beside them load experts or not."""
    async with client(url) as session:
        spans, loads = [], 0
        end = time.monotonic() + windows * WINDOW_SECONDS
        answers: list[Answer] = []

        async def run() -> None:
            while time.monotonic() < end:
                answers.append(await stream(session, names[0], 64))

        running = [asyncio.create_task(run()) for _ in range(2)]
        for window in range(windows):
            start = time.monotonic()
            loading = window % 2 == 1
            while time.monotonic() < start + WINDOW_SECONDS:
                name = names[1 + loads % 2] if loading else names[0]
                await stream(session, name, 1)
                loads += loading
                if not loading:
                    await asyncio.sleep(0.3)
            spans.append((start, time.monotonic(), loading))
        await asyncio.gather(*running)
    found: dict[bool, list[float]] = {False: [], True: []}
    for answer in answers:
        for at, gap in answer.gaps:
            for start, stop, loading in spans:
                if start <= at and at + gap <= stop:
                    found[loading].append(gap)
    return found[False], found[True], loads


async def ttft_of(url: str, names: list[str]) -> Figures:
    """First tokens: of one that has to be brought in, and again of it when it is there."""
    outside, inside = [], []
    async with client(url) as session:
        for round_ in range(ROUNDS + 1):
            for name in names:
                first = await stream(session, name, 2, f"{round_} ")
                again = await stream(session, name, 2, f"{round_}. ")
                if round_:
                    outside.append(first.ttft)
                    inside.append(again.ttft)
    extra = [a - b for a, b in zip(outside, inside, strict=True)]
    return {"ttft": spread(outside), "resident_ttft": spread(inside), "extra": spread(extra)}


async def flood_of(url: str, names: list[str]) -> tuple[list[float], float]:
    """Both slots are flooded; a third expert asks now and then."""
    async with client(url) as session:
        longest, over = 0.0, False

        async def flood(name: str) -> None:
            nonlocal longest
            while not over:
                answer = await stream(session, name, 24)
                longest = max(longest, answer.tokens[-1] - answer.asked)

        floods = [asyncio.create_task(flood(name)) for name in names[:2] for _ in range(4)]
        await asyncio.sleep(5)
        waits = []
        for _ in range(8):
            answer = await stream(session, names[2], 8)
            waits.append(answer.ttft)
            await asyncio.sleep(1)
        over = True
        await asyncio.gather(*floods)
    return waits, longest


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(len(values) * q), len(values) - 1)]


def spread(values: list[float]) -> Figures:
    return {
        "count": len(values),
        "median": statistics.median(values),
        "p99": quantile(values, 0.99),
        "longest": max(values),
    }
