"""The `deltamux` command: one typer application over the three packages."""

import typer

from deltamux.router.commands import route, router_app

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(router_app, name="router")
app.command("route")(route)


def main() -> None:
    """Run the command line."""
    app()
