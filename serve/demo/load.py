"""The demo's clients, and what the server's own metrics say about them."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm import tqdm

from deltamux.serve.names import AUTO

# Requests at one time, and tokens of an answer. Chosen, not measured: a batch that two cores fill.
CONCURRENCY = 8
MAX_TOKENS = 48


@dataclass(frozen=True)
class Ask:
    """One request of the load.

    Attributes:
        model: What the client names.
        prompt: What it asks.
        stream: Whether it streams.
    """

    model: str
    prompt: str
    stream: bool


def mixed_load(
    prompts: Mapping[str, Sequence[str]], seed: int = 0, routed: bool = True
) -> list[Ask]:
    """Requests for every model, half of them streamed.

    Args:
        prompts: Prompts by model name.
        seed: Of the order.
        routed: Ask `auto` for every second one.
    """
    asks = [
        Ask(AUTO if routed and index % 2 else model, prompt, stream=index % 4 < 2)
        for model, each in prompts.items()
        for index, prompt in enumerate(each)
    ]
    random.Random(seed).shuffle(asks)
    return asks


def run_load(url: str, asks: Sequence[Ask], label: str = "requests") -> list[str]:
    """Send the load with a real `openai` client, a few at a time; returns the answers."""
    return asyncio.run(_run(url, asks, label))


async def _run(url: str, asks: Sequence[Ask], label: str) -> list[str]:
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with tqdm(total=len(asks), desc=label, unit="request") as bar:

            async def one(ask: Ask) -> str:
                async with gate:
                    answer = await _answer(client, ask)
                    bar.update()
                    return answer

            return await asyncio.gather(*map(one, asks))


async def _answer(client: Any, ask: Ask) -> str:
    arguments: dict[str, Any] = {
        "model": ask.model,
        "messages": [{"role": "user", "content": ask.prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    if not ask.stream:
        response = await client.chat.completions.create(**arguments)
        return response.choices[0].message.content or ""
    parts = []
    async for chunk in await client.chat.completions.create(**arguments, stream=True):
        parts += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(parts)


class Scrape:
    """One reading of a server's `/metrics`."""

    def __init__(self, url: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"{url}/metrics", timeout=30).text
        self._samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("deltamux_")
        ]

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry the labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def quantile(self, name: str, q: float, since: "Scrape | None" = None, **labels: str) -> float:
        """A histogram's quantile, linear within a bucket, as PromQL's histogram_quantile.

        Args:
            name: The histogram.
            q: Which quantile, 0 to 1.
            since: An earlier reading; only what came after it counts.
            labels: Which of the histogram's series; all of them are added up.

        Returns:
            The quantile, NaN where nothing was observed; beyond the last bound, that bound.
        """
        buckets = self._buckets(name, labels)
        if since is not None:
            earlier = since._buckets(name, labels)
            buckets = {bound: count - earlier.get(bound, 0) for bound, count in buckets.items()}
        total = buckets.get(float("inf"), 0.0)
        if total == 0:
            return float("nan")
        lower, below = 0.0, 0.0
        for upper, count in sorted(buckets.items()):
            if count >= q * total:
                if upper == float("inf"):
                    break
                return lower + (upper - lower) * (q * total - below) / (count - below)
            lower, below = upper, count
        return lower

    def _buckets(self, name: str, labels: dict[str, str]) -> dict[float, float]:
        buckets: dict[float, float] = {}
        for sample in self._samples:
            if sample.name == f"{name}_bucket" and labels.items() <= sample.labels.items():
                bound = float(sample.labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
        return buckets
