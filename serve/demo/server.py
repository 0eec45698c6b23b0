"""The demo's server: a real `deltamux serve` process, started, awaited and stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from deltamux.serve.launch import free_port

# A cold start with compilation took 130 s on two cores.
START_SECONDS = 300.0
# vLLM ends within seconds of SIGTERM once its requests have. Chosen, not measured.
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5
# Characters of a log that an error quotes. Chosen, not measured.
MOST_WORDS = 500


class ServerError(RuntimeError):
    """The server ended while starting, or did not answer."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Its address, without a path.
        process: The process; its children are in its session.
        log: Where its output goes.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running_server(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends; see `start_server`."""
    server = start_server(command, log, environment, folder)
    try:
        yield server
    finally:
        stop_server(server)


def deltamux_serve(config: Path) -> list[str]:
    """The command that serves a configuration."""
    return [sys.executable, "-m", "deltamux.serve", "serve", str(config)]


def start_server(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Server:
    """Start a server on a free port of 127.0.0.1 and wait until it is healthy.

    Args:
        command: What serves, without host and port.
        log: Where its output goes.
        environment: Added to this process's.
        folder: Where it runs; None: here.

    Raises:
        ServerError: It ended or did not answer; the message quotes its last error.
    """
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **(environment or {})},
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _await_health(server)
    except BaseException:
        stop_server(server)
        raise
    return server


def stop_server(server: Server) -> None:
    """Ask the server to end, then end whatever is left of its session."""
    try:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def _await_health(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerError(f"the server ended while starting: {last_words(server.log)}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise ServerError(f"the server was not healthy in {START_SECONDS} s: {last_words(server.log)}")


def last_words(log: Path) -> str:
    """The last error in a log, or its last line, and where the rest is."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.search(r"(Error|Exception|error): ", line)]
    said = " ".join(" ".join(lines[(errors or [-1])[-1] :]).split())
    return f"{said[:MOST_WORDS]} (all of it is in {str(log)!r})"
