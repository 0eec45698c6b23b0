"""`deltamux demo`: the main job on a real model, from a package index and nothing else.

base → three full fine-tunes → compressed experts → router → one server with two slots → real
clients → its metrics. Whatever is finished is kept, so that a second run starts at the server.
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

from deltamux.compression.commands import compress_command
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
from deltamux.serve.demo.report import BASE_NAME, curl_line, measure
from deltamux.serve.demo.server import deltamux_serve, start_server, stop_server

SLOTS = 2
ROUTER_PROMPTS = 300
# Conversations to calibrate and to verify on: a minute of two cores an expert.
COMPRESSION_ROWS = 40
# Everything is local: neither a hub nor vLLM's usage statistics are to be asked.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

assert GENERAL in FALLBACK_DOMAINS


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
        typer.echo(curl_line(folder, server))
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
    make_base(folder.base)
    for domain in DOMAINS:
        if not folder.expert(domain).is_dir():
            typer.echo(f"\nfine-tuning {domain} (every weight)")
            examples = [
                data.Example(row["prompt"], row["response"])
                for row in rows(folder.data(domain, "train"))
            ]
            experts.train_expert(folder.base, examples, folder.expert(domain), seed=SEED)
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
        row, checked = expert_figures(folder, domain), verification(folder, domain)
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
    from deltamux.router.fit.data import read_dataset
    from deltamux.router.fit.fit import fit_router

    if not folder.router.is_dir():
        typer.echo("\nfitting the router")
        dataset = read_dataset(folder.root / "data")
        fit_router(dataset, folder.router, base=str(folder.base), seed=SEED, progress=True)
    typer.echo(f"router: {router_accuracy(folder):.1%} of held-out prompts to the right expert")


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
