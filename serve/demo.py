"""`deltamux demo`: the main job on a real model, from a package index and nothing else.

base → three full fine-tunes → compressed experts → router → one server with two slots → real
clients → its metrics. Whatever is finished is kept, so that a second run starts at the server.
"""

import json
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from deltamux.compression.artifact import Artifact
from deltamux.compression.checkpoint import open_checkpoint
from deltamux.compression.commands import compress_command
from deltamux.compression.recipe import CalibrationRecipe, Recipe, dump_recipe
from deltamux.router.config import FALLBACK_DOMAINS
from deltamux.serve import demo_data, demo_experts
from deltamux.serve.demo_base import make_base
from deltamux.serve.demo_load import MAX_TOKENS, Ask, Scrape, mixed_load, run_load
from deltamux.serve.demo_server import (
    Server,
    deltamux_serve,
    start_server,
    stop_server,
)
from deltamux.serve.settings import AUTO, BASE

DOMAINS = demo_data.SPECIALISTS
GENERAL = "general"
BASE_NAME = "smollm2-135m"
SLOTS = 2
REQUESTS_PER_DOMAIN = 12
ROUTER_PROMPTS = 300
# Conversations to calibrate and to verify on: a minute of two cores an expert.
COMPRESSION_ROWS = 40
SEED = 0
# What the demo promises: the fall of the held-out loss, what survives compression, and its size.
LOSS_DROP = 0.3
GAIN_KEPT = 0.97
BITS_PER_WEIGHT = 2.3
# Everything is local: neither a hub nor vLLM's usage statistics are to be asked.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

assert GENERAL in FALLBACK_DOMAINS


@dataclass(frozen=True)
class DemoFolder:
    """Where the demo keeps what it makes."""

    root: Path

    @property
    def base(self) -> Path:
        """The base checkpoint."""
        return self.root / "base"

    @property
    def router(self) -> Path:
        """The router."""
        return self.root / "router"

    @property
    def config(self) -> Path:
        """The server's configuration."""
        return self.root / "deltamux.yaml"

    def data(self, domain: str, split: str) -> Path:
        """Generated text of a domain."""
        return self.root / "data" / domain / f"{split}.jsonl"

    def expert(self, domain: str) -> Path:
        """A tuned checkpoint."""
        return self.root / "experts" / domain

    def compressed(self, domain: str) -> Path:
        """A compressed expert."""
        return self.root / "compressed" / domain


def demo_command(
    root: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path(".demo"),
    serve: Annotated[bool, typer.Option(help="Leave the server running.")] = False,
) -> None:
    """Run the main job on a small real model."""
    start = time.perf_counter()
    # Ended from outside, the demo still takes its server with it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = DemoFolder(root.absolute())
    make_data(folder)
    make_experts(folder)
    make_router(folder)
    write_config(folder)
    typer.echo(f"\nserving {len(DOMAINS)} experts in {SLOTS} slots …")
    command = deltamux_serve(folder.config)
    server = start_server(command, folder.root / "server.log", ENVIRONMENT)
    try:
        result = measure(folder, server)
    except BaseException:
        serve = False
        raise
    finally:
        if not serve:
            stop_server(server)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if serve:
        typer.echo(_curl(folder, server))
    typer.echo(json.dumps(result))


def make_data(folder: DemoFolder) -> None:
    """Generate text: prompts and responses of the domains, and prompts of none."""
    for domain in DOMAINS:
        if folder.data(domain, "test").is_file():
            continue
        splits = demo_data.train_test(
            domain, demo_experts.TRAIN_EXAMPLES, demo_experts.TEST_EXAMPLES, SEED
        )
        for split, examples in zip(("train", "test"), splits, strict=True):
            folder.data(domain, split).parent.mkdir(parents=True, exist_ok=True)
            demo_data.write_jsonl(folder.data(domain, split), examples)
    if folder.data(GENERAL, "test").is_file():
        return
    prompts = [
        {"prompt": prompt, "domain": GENERAL}
        for prompt in demo_data.general_prompts(ROUTER_PROMPTS, SEED)
    ]
    held_out = demo_experts.TEST_EXAMPLES
    folder.data(GENERAL, "test").parent.mkdir(parents=True, exist_ok=True)
    demo_data.write_jsonl(folder.data(GENERAL, "train"), prompts[held_out:])
    demo_data.write_jsonl(folder.data(GENERAL, "test"), prompts[:held_out])


def make_experts(folder: DemoFolder) -> None:
    """Base, fine-tunes and compressed experts; then a table of what was saved and lost."""
    make_base(folder.base)
    for domain in DOMAINS:
        if not folder.expert(domain).is_dir():
            typer.echo(f"\nfine-tuning {domain} (every weight)")
            examples = [
                demo_data.Example(row["prompt"], row["response"])
                for row in _rows(folder.data(domain, "train"))
            ]
            demo_experts.train_expert(folder.base, examples, folder.expert(domain), seed=SEED)
        if not folder.compressed(domain).is_dir():
            typer.echo(f"\ncompressing {domain}")
            compress_command(
                str(folder.base),
                str(folder.expert(domain)),
                folder.compressed(domain),
                calibration=folder.data(domain, "train"),
                held_out=folder.data(domain, "test"),
                recipe=_recipe(folder),
            )
    typer.echo(
        f"\n{'expert':<8}{'checkpoint':>12}{'compressed':>12}{'ratio':>7}{'bits/weight':>13}"
        f"{'loss base':>11}{'expert':>8}{'compr.':>8}{'gain kept':>11}"
    )
    for domain in DOMAINS:
        row, checked = expert_figures(folder, domain), _verification(folder, domain)
        typer.echo(
            f"{domain:<8}{row['bytes_full'] / 1e6:>9.1f} MB{row['bytes'] / 1e6:>9.1f} MB"
            f"{row['bytes_full'] / row['bytes']:>6.1f}x{row['bits_per_weight']:>13.3f}"
            f"{checked['nll_base']:>11.3f}{checked['nll_expert']:>8.3f}"
            f"{checked['nll_compressed']:>8.3f}{row['gain_kept']:>11.1%}"
        )


def _recipe(folder: DemoFolder) -> Path:
    recipe = Recipe(calibration=CalibrationRecipe(samples=COMPRESSION_ROWS))
    path = folder.root / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def make_router(folder: DemoFolder) -> None:
    """Fit the router on prompts of all domains, and check it on held-out ones."""
    from deltamux.router.data import read_dataset
    from deltamux.router.fit import fit_router

    if not folder.router.is_dir():
        typer.echo("\nfitting the router")
        dataset = read_dataset(folder.root / "data")
        fit_router(dataset, folder.router, base=str(folder.base), seed=SEED, progress=True)
    typer.echo(f"router: {router_accuracy(folder):.1%} of held-out prompts to the right expert")


def router_accuracy(folder: DemoFolder) -> float:
    """Share of held-out prompts of all domains that reach their expert (or, of none, the base)."""
    from deltamux.router.router import Router
    from deltamux.router.tokenizer import load_tokenizer

    router, encode = Router.load(folder.router), load_tokenizer(folder.router)
    right = total = 0
    for domain in (*DOMAINS, GENERAL):
        for row in _rows(folder.data(domain, "test")):
            decision = router.decide([row["prompt"]], encode)
            right += decision.expert == (None if domain == GENERAL else domain)
            total += 1
    return right / total


def write_config(folder: DemoFolder) -> None:
    """The server's configuration, as a user would write it."""
    content = {
        "version": 1,
        "base": {"model": "base"},
        "experts": [{"name": name, "path": f"compressed/{name}"} for name in DOMAINS],
        "router": {"path": "router", "fallback": "base"},
        "slots": SLOTS,
        "host_cache": "2GiB",
        "engine": {
            "served_model_name": BASE_NAME,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**29,
        },
    }
    folder.config.write_text(yaml.safe_dump(content, sort_keys=False))


def measure(folder: DemoFolder, server: Server) -> dict[str, Any]:
    """Load the server and read its metrics; prints the closing table."""
    prompts = {
        name: [row["prompt"] for row in _rows(folder.data(name, "test"))[:REQUESTS_PER_DOMAIN]]
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
    checked = _verification(folder, domain)
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


def expert_figures(folder: DemoFolder, domain: str) -> dict[str, Any]:
    """Sizes and quality of a compressed expert."""
    artifact = Artifact(folder.compressed(domain))
    return {
        "bits_per_weight": artifact.manifest.totals.bits_per_weight,
        "bytes": artifact.total_bytes(),
        "bytes_full": open_checkpoint(folder.expert(domain)).total_bytes(),
        "gain_kept": _verification(folder, domain)["gain_kept"],
    }


def _verification(folder: DemoFolder, domain: str) -> dict[str, float]:
    verification = Artifact(folder.compressed(domain)).manifest.verification
    assert verification is not None
    return verification


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _curl(folder: DemoFolder, server: Server) -> str:
    body = {
        "model": AUTO,
        "messages": [{"role": "user", "content": _rows(folder.data("shell", "test"))[0]["prompt"]}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    return (
        f"\nthe server runs on (stop it with: kill {server.process.pid}); try:\n"
        f"curl -i {server.url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}\n"
    )
