"""A load on the demo's server, and the closing tables."""

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import typer

from deltamux.compression.console import table
from deltamux.serve.demo.load import MAX_TOKENS, Ask, Scrape, mixed_load, run_load
from deltamux.serve.demo.server import Server
from deltamux.serve.names import BASE


@dataclass(frozen=True)
class Traffic:
    """What the server counted during a load.

    Attributes:
        rows: Figures by expert, and of the base.
        seconds: How long the load took.
        tokens_per_second: Of all requests together.
        swaps: Moves into slots, those of the warm-up too.
        memory_bytes: By kind, at the end.
    """

    rows: dict[str, dict[str, float]]
    seconds: float
    tokens_per_second: float
    swaps: int
    memory_bytes: dict[str, int]


def measure(
    server: Server, prompts: Mapping[str, Sequence[str]], base: str, routed: bool
) -> Traffic:
    """Load a server and read its metrics.

    Args:
        server: The server.
        prompts: Prompts by the model that is asked for them.
        base: What the server calls its base.
        routed: Whether every second request leaves the choice to the router.
    """
    asks = mixed_load(prompts, routed=routed)
    # The CPU engine builds its kernels for each new batch size on first use.
    run_load(server.url, [Ask(base, ask.prompt, ask.stream) for ask in asks], "warm-up")
    warm = Scrape(server.url)
    begin = time.perf_counter()
    run_load(server.url, asks)
    seconds = time.perf_counter() - begin
    scrape = Scrape(server.url)
    names = [BASE if name == base else name for name in prompts]
    rows = {name: _row(scrape, warm, name, seconds) for name in names}
    kinds = ("base", "slots", "host_cache", "kv_cache")
    return Traffic(
        rows=rows,
        seconds=seconds,
        tokens_per_second=sum(row["tokens_per_second"] for row in rows.values()),
        swaps=int(scrape.total("deltamux_swaps_total", tier="slot")),
        memory_bytes={k: int(scrape.total("deltamux_memory_bytes", kind=k)) for k in kinds},
    )


def _row(scrape: Scrape, warm: Scrape, expert: str, seconds: float) -> dict[str, float]:
    """What the server counted for one expert since the warm-up."""

    def grown(name: str, **labels: str) -> float:
        return scrape.total(name, expert=expert, **labels) - warm.total(
            name, expert=expert, **labels
        )

    def ttft(q: float) -> float:
        return scrape.quantile("deltamux_ttft_seconds", q, warm, expert=expert)

    generated = grown("deltamux_tokens_total", kind="generated")
    in_requests = grown("deltamux_e2e_seconds_sum")
    return {
        "requests": int(grown("deltamux_requests_total")),
        "tokens_per_second": generated / seconds,
        "request_tokens_per_second": generated / in_requests if in_requests else math.nan,
        "ttft_p50_seconds": ttft(0.5),
        "ttft_p95_seconds": ttft(0.95),
        "swaps": int(grown("deltamux_swaps_total", tier="slot")),
    }


def show(traffic: Traffic, checkpoint_bytes: Mapping[str, int]) -> None:
    """Print the closing tables.

    Args:
        traffic: What was measured.
        checkpoint_bytes: Weights of each uncompressed expert.
    """
    header = ("model", "requests", "tokens/s", "in a request", "TTFT p50", "p95", "swaps")
    rows = [
        (
            name,
            row["requests"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['request_tokens_per_second']:.1f}",
            f"{row['ttft_p50_seconds']:.3f} s",
            f"{row['ttft_p95_seconds']:.3f} s",
            row["swaps"],
        )
        for name, row in traffic.rows.items()
    ]
    typer.echo(f"\n{table(header, rows)}")
    typer.echo(
        f"\nall requests together: {traffic.tokens_per_second:.1f} tokens/s over {traffic.seconds:.1f} s"
        " (measured; 'in a request' is the speed that one client sees)"
    )
    memory = {kind: f"{size / 1e6:.1f} MB" for kind, size in traffic.memory_bytes.items()}
    typer.echo(
        f"memory: base {memory['base']}, slots {memory['slots']}, host cache {memory['host_cache']} (measured)"
    )
    merged = sum(checkpoint_bytes.values())
    typer.echo(
        f"plain vLLM would hold {len(checkpoint_bytes)} merged models in as many servers: "
        f"{merged / 1e6:.1f} MB of weights (computed from the checkpoints); how fast one of them is "
        "beside this server, `python -m benchmarks.serving` measures"
    )


def how_to_try(server: Server, model: str, prompt: str) -> str:
    """The console's address, and a request to send by hand."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    return (
        f"\nthe server runs on (stop it with: kill {server.process.pid})\n"
        f"look at it: {server.url}/console\n"
        f"ask it: curl -i {server.url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}\n"
    )
