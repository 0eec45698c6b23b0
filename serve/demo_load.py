"""The demo's clients, and what the server's own metrics say about them."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm import tqdm

from deltamux.serve.settings import AUTO

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


def mixed_load(prompts: Mapping[str, Sequence[str]], seed: int = 0) -> list[Ask]:
    """Requests for every domain, half by name and half by `auto`, half of them streamed.

    Args:
        prompts: Prompts by model name.
        seed: Of the order.
    """
    asks = [
        Ask(AUTO if index % 2 else model, prompt, stream=index % 4 < 2)
        for model, each in prompts.items()
        for index, prompt in enumerate(each)
    ]
    random.Random(seed).shuffle(asks)
    return asks


def run_load(url: str, asks: Sequence[Ask]) -> list[str]:
    """Send the load with a real `openai` client, a few at a time; returns the answers."""
    return asyncio.run(_run(url, asks))


async def _run(url: str, asks: Sequence[Ask]) -> list[str]:
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with tqdm(total=len(asks), desc="requests", unit="request") as bar:

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

    def quantile(self, name: str, q: float, **labels: str) -> float:
        """A histogram's quantile, linear within a bucket, as PromQL's histogram_quantile."""
        buckets = sorted(
            (float(sample.labels["le"]), sample.value)
            for sample in self._samples
            if sample.name == f"{name}_bucket" and labels.items() <= sample.labels.items()
        )
        if not buckets or buckets[-1][1] == 0:
            return float("nan")
        rank = q * buckets[-1][1]
        lower, below = 0.0, 0.0
        for upper, count in buckets:
            if count >= rank:
                if upper == float("inf"):
                    return lower
                return lower + (upper - lower) * (rank - below) / (count - below)
            lower, below = upper, count
        return lower
