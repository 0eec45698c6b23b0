"""What `swap.py` sends: streams whose tokens are timed, and a trace with Zipf-distributed experts."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httpx

PROMPT = "Question: a farmer has seven fields and sells two of them. How many are left?\nAnswer:"


@dataclass
class Answer:
    """One streamed answer: when it was asked for and when its tokens came, on the monotonic clock."""

    model: str
    asked: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.asked

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Each gap with the time at which it began."""
        return [(a, b - a) for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


async def stream(client: httpx.AsyncClient, model: str, tokens: int, salt: str = "") -> Answer:
    """Ask for exactly so many tokens."""
    body = {
        "model": model,
        "prompt": salt + PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    answer = Answer(model, time.monotonic())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if "error" in json.loads(line[6:]):
                    raise RuntimeError(line)
                answer.tokens.append(time.monotonic())
    return answer


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits)


@dataclass(frozen=True)
class Due:
    """A request of a trace: seconds after its start, the expert's rank, tokens of the answer."""

    at: float
    expert: int
    tokens: int


def zipf_trace(experts: int, requests: int, per_second: float, seed: int = 0) -> list[Due]:
    """Poisson arrivals; the expert of rank r is asked for in proportion to 1 / (r + 1)."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(experts)]
    at, trace = 0.0, []
    for _ in range(requests):
        at += draw.expovariate(per_second)
        (expert,) = draw.choices(range(experts), weights)
        trace.append(Due(at, expert, draw.choice((8, 16, 32))))
    return trace


async def replay(url: str, trace: list[Due], names: list[str]) -> list[Answer]:
    async with client(url) as session:
        start = time.monotonic()

        async def one(index: int, due: Due) -> Answer:
            await asyncio.sleep(start + due.at - time.monotonic())
            # Prompts differ from the first token on: no prefix is shared.
            return await stream(session, names[due.expert], due.tokens, f"{index}. ")

        return list(await asyncio.gather(*(one(i, due) for i, due in enumerate(trace))))
