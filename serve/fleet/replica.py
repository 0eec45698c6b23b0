"""One replica's server: a `deltamux serve` process, its configuration, and what it says of its load.

A replica is configured like a single server, but for the files that only one process may write: those of experts that clients
added, which the fleet keeps itself, and of the router's decisions.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deltamux.serve.launch import free_port
from deltamux.serve.settings import Settings, load_settings

# A cold start with compilation takes minutes.
START_SECONDS = 1800.0
# As long as the server lets requests end after SIGTERM, and some seconds.
STOP_SECONDS = 45.0
POLL_SECONDS = 0.2
CHILD = "deltamux.serve.fleet.child"


def replica_settings(settings: Settings) -> dict[str, Any]:
    """`deltamux.yaml` for a replica."""
    router = settings.router and settings.router.model_copy(update={"log": None})
    changed = settings.model_copy(update={"state": None, "router": router})
    return changed.model_dump(mode="json", exclude_none=True)


class ReplicaServer:
    """The process.

    Args:
        config: The fleet's `deltamux.yaml`.
        host: Where it listens.
    """

    def __init__(self, config: Path, host: str = "127.0.0.1") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="deltamux-replica-")
        path = Path(self._folder.name) / "deltamux.yaml"
        path.write_text(yaml.safe_dump(replica_settings(load_settings(config))))
        port = free_port(host)
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", CHILD, str(path), "--host", host, "--port", str(port)]
        command.append("--disable-uvicorn-access-log")  # the front looks at it twice a second
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._load = Load()

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It ended, or took too long.
        """
        end = time.monotonic() + START_SECONDS
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended while starting: {self.process.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"the server was not healthy in {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def healthy(self) -> bool:
        """Whether it answers, and its engine is alive."""
        if self.process.poll() is not None:
            return False
        try:
            answer = httpx.get(f"{self.url}/health", timeout=10, trust_env=False)
        except httpx.TransportError:
            return False
        return answer.status_code == httpx.codes.OK

    def load(self, key: str | None) -> tuple[float, float]:
        """Requests that wait, and swaps a request since the last look."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        page = httpx.get(f"{self.url}/metrics", headers=headers, timeout=10, trust_env=False)
        return self._load.seen(page.text)

    def stop(self) -> None:
        """Let its requests end, and end it with all its processes."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._folder.cleanup()


class Load:
    """What a page of metrics says of a server's load, looked at again and again."""

    def __init__(self) -> None:
        self._swaps = self._requests = 0.0

    def seen(self, page: str) -> tuple[float, float]:
        """Requests that wait, and swaps a request since the last page."""
        waiting = swaps = requests = 0.0
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "deltamux_requests_in_flight":
                    waiting += sample.value * (sample.labels["state"] == "waiting")
                elif sample.name == "deltamux_swaps_total":
                    swaps += sample.value * (sample.labels["tier"] == "slot")
                elif sample.name == "deltamux_requests_total":
                    requests += sample.value
        moved, asked = swaps - self._swaps, requests - self._requests
        self._swaps, self._requests = swaps, requests
        return waiting, moved / asked if asked > 0 else 0.0
