"""`deltamux demo --base BASE --experts A B …`: public fine-tunes of one base, compressed and served.

For people with a GPU and the model hub; directories work as well. Nothing is trained and no router is
fitted: there are no labelled prompts. Experts are asked by name, in one batch with the base.
"""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import typer
import yaml

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.commands import compress_command
from deltamux.compression.paths import resolve_directory
from deltamux.serve.demo import data
from deltamux.serve.demo.folder import SEED
from deltamux.serve.demo.report import how_to_try, measure, show
from deltamux.serve.demo.server import Server
from deltamux.serve.demo.stage import announce, end_with_server, with_server
from deltamux.serve.names import BASE, check_expert_name

# Prompts that each model is asked. Chosen, not measured.
PROMPTS_PER_MODEL = 8
# One slot fewer than experts from three experts on, so that swaps happen. Chosen, not measured.
MOST_SLOTS = 4
# Length of a request, so that little KV cache is needed. Chosen, not measured.
MOST_TOKENS = 1024
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}


def run_public(root: Path, base: str, sources: Sequence[str], serve: bool) -> None:
    """Compress fine-tunes and serve them together.

    Args:
        root: Where artifacts and configuration are kept.
        base: Directory or hub id of the base.
        sources: Directories or hub ids of the fine-tunes.
        serve: Whether to leave the server running.

    Raises:
        ValueError: There are no experts, or two would be called alike.
    """
    start = time.perf_counter()
    names = expert_names(sources)
    end_with_server()
    root = root.absolute()
    for name, source in names.items():
        target = root / "compressed" / name
        if not target.is_dir():
            announce(f"compressing {source}", "minutes on a GPU, hours on a few cores for 7B")
            compress_command(base, source, target)
    slots = min(MOST_SLOTS, len(names) - (len(names) > 2))
    config = write_config(root, base, list(names), slots)
    announce(f"serving {len(names)} experts in {slots} slots", "as long as vLLM takes to start")
    result = with_server(
        config, root / "server.log", ENVIRONMENT, serve, lambda s: load(root, names, s, serve)
    )
    typer.echo(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))


def load(
    root: Path, names: dict[str, str], server: Server, keeps_running: bool
) -> dict[str, object]:
    """Ask every model the same, print what the server counted, and return it for programs."""
    prompts = data.general_prompts(PROMPTS_PER_MODEL, SEED)
    traffic = measure(server, dict.fromkeys((*names, BASE), prompts), BASE, routed=False)
    show(traffic, {name: open_checkpoint(source).total_bytes() for name, source in names.items()})
    if keeps_running:
        typer.echo(how_to_try(server, next(iter(names)), prompts[0]))
    sizes = {name: Artifact(root / "compressed" / name).total_bytes() for name in names}
    return {
        "experts": {name: traffic.rows[name] | {"bytes": sizes[name]} for name in names},
        "tokens_per_second": traffic.tokens_per_second,
        "memory_bytes": traffic.memory_bytes,
    }


def expert_names(sources: Sequence[str]) -> dict[str, str]:
    """What each fine-tune is called: the last part of its path or hub id.

    Raises:
        ValueError: There are none, or two would be called alike.
    """
    if not sources:
        raise ValueError("--base needs --experts: name one fine-tune of it or more")
    names: dict[str, str] = {}
    for source in sources:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).name)
        check_expert_name(name)
        if name in names:
            raise ValueError(f"{source!r} and {names[name]!r} would both be called {name!r}")
        names[name] = source
    return names


def write_config(root: Path, base: str, names: Sequence[str], slots: int) -> Path:
    """The server's configuration, as a user would write it."""
    config = json.loads((resolve_directory(base) / "config.json").read_text())
    length = min(MOST_TOKENS, int(config.get("max_position_embeddings", MOST_TOKENS)))
    model = str(Path(base).absolute()) if Path(base).is_dir() else base
    content = {
        "version": 1,
        "base": {"model": model},
        "experts": [{"name": name, "path": f"compressed/{name}"} for name in names],
        "slots": slots,
        "engine": {"served_model_name": BASE, "max_model_len": length, "max_num_seqs": 16},
    }
    path = root / "deltamux.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
