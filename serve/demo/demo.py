"""`deltamux demo`: the main job on a real model, from a package index and nothing else.

base → three full fine-tunes → compressed experts → router → one server with two slots → real
clients → its metrics. Whatever is finished is kept, so that a second run starts at the server, and one
that was interrupted goes on where it stopped.
"""

import json
import time
from pathlib import Path
from typing import Any

import typer
import yaml

from deltamux.compression.commands import compress_command
from deltamux.compression.console import table
from deltamux.compression.recipe import CalibrationRecipe, Recipe, dump_recipe
from deltamux.router.decide.config import FALLBACK_DOMAINS
from deltamux.serve.demo import data, experts
from deltamux.serve.demo.base import make_base
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
from deltamux.serve.demo.report import Traffic, how_to_try, measure, show
from deltamux.serve.demo.server import Server
from deltamux.serve.demo.stage import announce, end_with_server, with_server
from deltamux.serve.names import AUTO

SERVED_BASE = "smollm2-135m"
# Fewer than experts, so that swaps happen. Chosen, not measured.
SLOTS = 2
# Prompts of no expert's domain, for the router. Chosen, not measured.
ROUTER_PROMPTS = 300
# Conversations to calibrate and to verify on: a minute of two cores an expert.
COMPRESSION_ROWS = 24
# Enough for each expert to be asked by name and by `auto`, streamed and not. Chosen, not measured.
REQUESTS_PER_DOMAIN = 12
# Everything is local: neither a hub nor vLLM's usage statistics are to be asked.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# What the demo promises: the fall of the held-out loss, what survives compression, and its size. Chosen well
# below what is measured (0.9, 0.999 and 1.0), so that another machine's rounding does not fail it.
LOSS_DROP = 0.3
GAIN_KEPT = 0.97
BITS_PER_WEIGHT = 2.3

assert GENERAL in FALLBACK_DOMAINS


def run_demo(root: Path, serve: bool) -> None:
    """Run the main job on a small real model.

    Args:
        root: Where everything is kept.
        serve: Whether to leave the server running.
    """
    start = time.perf_counter()
    end_with_server()
    folder = DemoFolder(root.absolute())
    make_data(folder)
    make_experts(folder)
    make_router(folder)
    write_config(folder)
    announce(
        f"serving {len(DOMAINS)} experts in {SLOTS} slots",
        "half a minute to start, then 96 requests",
    )
    log = folder.root / "server.log"
    result = with_server(folder.config, log, ENVIRONMENT, serve, lambda s: load(folder, s, serve))
    result["seconds"] = round(time.perf_counter() - start, 1)
    typer.echo(json.dumps(result))


def make_data(folder: DemoFolder) -> None:
    """Generate text: prompts and responses of the domains, and prompts of none."""
    for domain in DOMAINS:
        if folder.data(domain, "test").is_file():
            continue
        splits = data.train_test(domain, experts.TRAIN_EXAMPLES, experts.TEST_EXAMPLES, SEED)
        for split, examples in zip(("train", "test"), splits, strict=True):
            folder.data(domain, split).parent.mkdir(parents=True, exist_ok=True)
            data.write_jsonl(folder.data(domain, split), examples)
    if folder.data(GENERAL, "test").is_file():
        return
    prompts = [
        {"prompt": prompt, "domain": GENERAL}
        for prompt in data.general_prompts(ROUTER_PROMPTS, SEED)
    ]
    held_out = experts.TEST_EXAMPLES
    folder.data(GENERAL, "test").parent.mkdir(parents=True, exist_ok=True)
    data.write_jsonl(folder.data(GENERAL, "train"), prompts[held_out:])
    data.write_jsonl(folder.data(GENERAL, "test"), prompts[:held_out])


def make_experts(folder: DemoFolder) -> None:
    """Base, fine-tunes and compressed experts; then a table of what was saved and lost."""
    if not folder.base.is_dir():
        announce("unpacking the base, SmolLM2-135M-Instruct", "seconds")
    make_base(folder.base)
    for domain in DOMAINS:
        if not folder.expert(domain).is_dir():
            announce(f"fine-tuning {domain}, every weight", "2 minutes on two cores")
            examples = [
                data.Example(row["prompt"], row["response"])
                for row in rows(folder.data(domain, "train"))
            ]
            experts.train_expert(folder.base, examples, folder.expert(domain), seed=SEED)
        if not folder.compressed(domain).is_dir():
            announce(f"compressing {domain}", "a minute on two cores")
            compress_command(
                str(folder.base),
                str(folder.expert(domain)),
                folder.compressed(domain),
                calibration=folder.data(domain, "train"),
                held_out=folder.data(domain, "test"),
                recipe=_recipe(folder),
            )
    typer.echo(f"\n{_saved_and_lost(folder)}")


def _saved_and_lost(folder: DemoFolder) -> str:
    header = (
        *("expert", "checkpoint", "compressed", "ratio", "bits/weight"),
        *("loss: base", "expert", "compressed", "gain kept"),
    )
    lines = []
    for domain in DOMAINS:
        row, checked = expert_figures(folder, domain), verification(folder, domain)
        lines.append(
            (
                domain,
                f"{row['bytes_full'] / 1e6:.1f} MB",
                f"{row['bytes'] / 1e6:.1f} MB",
                f"{row['bytes_full'] / row['bytes']:.1f}x",
                f"{row['bits_per_weight']:.3f}",
                f"{checked['nll_base']:.3f}",
                f"{checked['nll_expert']:.3f}",
                f"{checked['nll_compressed']:.3f}",
                f"{row['gain_kept']:.1%}",
            )
        )
    return table(header, lines)


def _recipe(folder: DemoFolder) -> Path:
    recipe = Recipe(calibration=CalibrationRecipe(samples=COMPRESSION_ROWS))
    path = folder.root / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def make_router(folder: DemoFolder) -> None:
    """Fit the router on prompts of all domains, and check it on held-out ones."""
    from deltamux.router.fit.data import read_dataset
    from deltamux.router.fit.fit import fit_router
    from deltamux.router.fit.options import Options

    if not folder.router.is_dir():
        announce("fitting the router", "half a minute on two cores")
        dataset = read_dataset(folder.root / "data")
        fit_router(dataset, folder.router, Options(seed=SEED), base=str(folder.base), progress=True)
    typer.echo(f"\nrouter: {router_accuracy(folder):.1%} of held-out prompts to the right expert")


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
            "served_model_name": SERVED_BASE,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**29,
        },
    }
    folder.config.write_text(yaml.safe_dump(content, sort_keys=False))


def load(folder: DemoFolder, server: Server, keeps_running: bool) -> dict[str, Any]:
    """Ask the server, print what it counted, and say whether the demo's promises hold."""
    prompts = {
        name: [row["prompt"] for row in rows(folder.data(name, "test"))[:REQUESTS_PER_DOMAIN]]
        for name in (*DOMAINS, GENERAL)
    }
    prompts[SERVED_BASE] = prompts.pop(GENERAL)
    traffic = measure(server, prompts, SERVED_BASE, routed=True)
    found = {name: expert_figures(folder, name) | traffic.rows[name] for name in DOMAINS}
    show(traffic, {name: int(found[name]["bytes_full"]) for name in DOMAINS})
    if keeps_running:
        typer.echo(how_to_try(server, AUTO, prompts["shell"][0]))
    return summary(folder, traffic, found)


def summary(
    folder: DemoFolder, traffic: Traffic, found: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The demo's figures, for programs."""
    return {
        "ok": traffic.swaps > 0 and all(_is_good(folder, name, row) for name, row in found.items()),
        "experts": found,
        "router": {"accuracy": router_accuracy(folder)},
        "swaps": traffic.swaps,
        "tokens_per_second": traffic.tokens_per_second,
        "load_seconds": traffic.seconds,
        "memory_bytes": traffic.memory_bytes,
    }


def _is_good(folder: DemoFolder, domain: str, row: dict[str, Any]) -> bool:
    """Whether an expert learned, survived compression and answered."""
    checked = verification(folder, domain)
    learned = checked["nll_expert"] <= (1 - LOSS_DROP) * checked["nll_base"]
    small = row["gain_kept"] >= GAIN_KEPT and row["bits_per_weight"] <= BITS_PER_WEIGHT
    return bool(learned and small and row["requests"] > 0)
