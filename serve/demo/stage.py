"""The demo's announcements: what comes next and how long it takes, and its server around a load."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import typer

from deltamux.serve.demo.server import Server, deltamux_serve, start_server, stop_server

Result = TypeVar("Result")


def announce(what: str, how_long: str) -> None:
    """Say what comes next, and how long it takes."""
    typer.echo(f"\n== {what} ({how_long})")


def end_with_server() -> None:
    """Let a signal from outside unwind the stack, so that the server ends with the demo."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def with_server(
    config: Path,
    log: Path,
    environment: dict[str, str],
    keep: bool,
    work: Callable[[Server], Result],
) -> Result:
    """Do something with a server.

    Args:
        config: Its configuration.
        log: Where its output goes.
        environment: Added to this process's.
        keep: Leave it running if all went well.
        work: What to do.

    Returns:
        What the work returns.
    """
    server = start_server(deltamux_serve(config), log, environment)
    try:
        result = work(server)
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            stop_server(server)
    return result
