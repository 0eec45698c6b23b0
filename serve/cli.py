"""The `deltamux` command: one typer application over the three packages."""

import sys

import typer

from deltamux.compression.commands import (
    compress_command,
    evaluate_command,
    inspect_command,
    merge_command,
)
from deltamux.router.commands import route, router_app
from deltamux.serve.demo.demo import demo_command
from deltamux.serve.launch import serve_command

app = typer.Typer(
    name="deltamux",
    help="Serve many fully fine-tuned experts of one base model from one vLLM engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compress")(compress_command)
app.command("inspect")(inspect_command)
app.command("merge")(merge_command)
app.command("evaluate")(evaluate_command)
app.add_typer(router_app, name="router")
# A text may begin with a dash: "-5 degrees".
app.command("route", context_settings={"ignore_unknown_options": True})(route)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve_command
)
app.command("demo")(demo_command)


def main() -> None:
    """Run the command line; what the user got wrong is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
