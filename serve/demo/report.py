"""The demo's load on its server, and the closing table."""

import json
import shlex
import time
from typing import Any

import typer

from deltamux.serve.demo.folder import (
    DOMAINS,
    GENERAL,
    SEED,
    DemoFolder,
    expert_figures,
    router_accuracy,
    rows,
    verification,
)
from deltamux.serve.demo.load import MAX_TOKENS, Ask, Scrape, mixed_load, run_load
from deltamux.serve.demo.server import Server
from deltamux.serve.settings import AUTO, BASE

BASE_NAME = "smollm2-135m"
REQUESTS_PER_DOMAIN = 12
# What the demo promises: the fall of the held-out loss, what survives compression, and its size.
LOSS_DROP = 0.3
GAIN_KEPT = 0.97
BITS_PER_WEIGHT = 2.3


def measure(folder: DemoFolder, server: Server) -> dict[str, Any]:
    """Load the server and read its metrics; prints the closing table."""
    prompts = {
        name: [row["prompt"] for row in rows(folder.data(name, "test"))[:REQUESTS_PER_DOMAIN]]
        for name in (*DOMAINS, GENERAL)
    }
    prompts[BASE_NAME] = prompts.pop(GENERAL)
    asks = mixed_load(prompts, SEED)
    # The CPU engine builds its kernels for each new batch size on first use.
    run_load(server.url, [Ask(BASE_NAME, ask.prompt, ask.stream) for ask in asks], "warm-up")
    warm = Scrape(server.url)
    begin = time.perf_counter()
    run_load(server.url, asks)
    wall = time.perf_counter() - begin
    scrape = Scrape(server.url)
    experts = {}
    typer.echo(
        f"\n{'expert':<8}{'requests':>9}{'tokens/s':>10}{'TTFT p50':>11}{'p95':>9}"
        f"{'swaps':>7}{'bytes':>12}"
    )
    for name in (*DOMAINS, BASE):
        row = traffic(scrape, warm, name, wall)
        size = expert_figures(folder, name) if name in DOMAINS else {}
        typer.echo(
            f"{name:<8}{row['requests']:>9}{row['tokens_per_second']:>10.1f}"
            f"{row['ttft_p50_seconds']:>9.3f} s{row['ttft_p95_seconds']:>7.3f} s"
            f"{row['swaps']:>7}{size.get('bytes', 0):>12,}"
        )
        if name in DOMAINS:
            experts[name] = size | row
    swaps = int(scrape.total("deltamux_swaps_total", tier="slot"))
    return {
        "ok": swaps > 0 and all(_is_good(folder, name, row) for name, row in experts.items()),
        "experts": experts,
        "router": {"accuracy": router_accuracy(folder)},
        "swaps": swaps,
    }


def _is_good(folder: DemoFolder, domain: str, row: dict[str, Any]) -> bool:
    """Whether an expert learned, survived compression and answered."""
    checked = verification(folder, domain)
    learned = checked["nll_expert"] <= (1 - LOSS_DROP) * checked["nll_base"]
    small = row["gain_kept"] >= GAIN_KEPT and row["bits_per_weight"] <= BITS_PER_WEIGHT
    return bool(learned and small and row["requests"] > 0)


def traffic(scrape: Scrape, warm: Scrape, expert: str, wall_seconds: float) -> dict[str, Any]:
    """What the server counted for one expert during the load, the warm-up left out."""

    def grown(name: str, **labels: str) -> float:
        return scrape.total(name, expert=expert, **labels) - warm.total(
            name, expert=expert, **labels
        )

    def ttft(q: float) -> float:
        return scrape.quantile("deltamux_ttft_seconds", q, warm, expert=expert)

    return {
        "requests": int(grown("deltamux_requests_total")),
        "tokens_per_second": grown("deltamux_tokens_total", kind="generated") / wall_seconds,
        "ttft_p50_seconds": ttft(0.5),
        "ttft_p95_seconds": ttft(0.95),
        "swaps": int(grown("deltamux_swaps_total", tier="slot")),
    }


def curl_line(folder: DemoFolder, server: Server) -> str:
    """A request to try by hand."""
    body = {
        "model": AUTO,
        "messages": [{"role": "user", "content": rows(folder.data("shell", "test"))[0]["prompt"]}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    return (
        f"\nthe server runs on (stop it with: kill {server.process.pid}); try:\n"
        f"curl -i {server.url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}\n"
    )
