"""The demo's server: a real `deltamux serve` process, started, awaited and stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 300.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5


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
    config: Path, log: Path, flags: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Run `deltamux serve` on a free port of 127.0.0.1 until the block ends.

    Raises:
        RuntimeError: The server ended or did not answer; the message quotes its last words.
    """
    server = start_server(config, log, flags, environment)
    try:
        yield server
    finally:
        stop_server(server)


def start_server(
    config: Path, log: Path, flags: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> Server:
    """Start a server and wait until it is healthy."""
    port = free_port()
    command = [sys.executable, "-m", "deltamux.serve", "serve", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
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
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
    try:
        os.killpg(server.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _await_health(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended while starting:\n{last_lines(server.log)}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise RuntimeError(
        f"the server was not healthy in {START_SECONDS} s:\n{last_lines(server.log)}"
    )


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
