"""A fleet as its users run it: two servers on Ray, one endpoint, one of them killed under load."""

import importlib.util
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deltamux.serve.demo.server import deltamux_serve, last_words
from deltamux.serve.launch import free_port

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
NAMES = ("math", "sql", "shell", "poems")


@dataclass(frozen=True)
class Fleet:
    """A running fleet."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=300, **arguments)

    def ask(self, model: str, tokens: int = 4) -> httpx.Response:
        asked = {"model": model, "prompt": "hello", "max_tokens": tokens, "ignore_eos": True}
        return self.http("POST", "/v1/completions", json=asked)

    def ready(self) -> int:
        assert self.process.poll() is None, last_words(self.folder / "fleet.log")
        try:
            return sum(self.http("GET", "/v1/ready").json()["replicas"].values())
        except (httpx.TransportError, ValueError, KeyError):
            return 0

    def servers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if "vllm.entrypoints" in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: SimpleNamespace,
    text_file: Path,
    eventually: Callable[[Callable[[], Any]], Any],
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    checkpoints.write_parts(folder, text_file, (*NAMES, "late"))
    experts = [{"name": name, "path": name} for name in NAMES]
    checkpoints.write_config(folder, {}, experts=experts, slot={"bytes": "64KiB"})
    port = free_port()
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"server": "deltamux.yaml", "port": port, "state": "s.json"}))
    command = [*deltamux_serve(path)[:-2], "fleet", str(path)]
    with (folder / "fleet.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **checkpoints.environment},
        )
    found = Fleet(f"http://127.0.0.1:{port}", process, folder)
    try:
        eventually(lambda: found.ready() == 2)
        yield found
    finally:
        servers = found.servers() if process.poll() is None else []
        process.terminate()
        process.wait(120)
        assert not psutil.wait_procs(servers, 60)[1]


def test_experts_keep_to_their_replica_and_auto_finds_it(
    fleet: Fleet, checkpoints: SimpleNamespace
) -> None:
    places = {
        name: {fleet.ask(name).headers["x-deltamux-replica"] for _ in "123"} for name in NAMES
    }
    assert all(len(found) == 1 for found in places.values())
    words = checkpoints.words["sql"].split()
    said = fleet.http(
        "POST",
        "/v1/completions",
        json={"model": "auto", "prompt": f"{words[0]} the {words[4]} of {words[2]}"},
    )
    assert said.headers["x-deltamux-expert"] == "sql"
    assert said.headers["x-deltamux-reason"] == "router"
    assert {said.headers["x-deltamux-replica"]} == places["sql"]
    experts = {each["id"]: each for each in fleet.http("GET", "/v1/experts").json()["data"]}
    (home,) = places["sql"]
    assert set(experts["sql"]["replicas"]) == {"replica-0", "replica-1"}
    assert experts["sql"]["replicas"][home]["tier"] in ("slot", "host")
    page = checkpoints.scraped(fleet.http("GET", "/metrics").text)
    assert page["deltamux_fleet_ready", "replica=replica-0"] == 1.0


def test_a_killed_server_loses_nothing_and_comes_back_with_what_was_added(
    fleet: Fleet, eventually: Callable[[Callable[[], Any]], Any]
) -> None:
    body = {"name": "late", "path": str(fleet.folder / "late")}
    assert fleet.http("POST", "/v1/experts", json=body).json()["replicas"] == {
        "replica-0": 201,
        "replica-1": 201,
    }
    with ThreadPoolExecutor(6) as pool:
        waits = [pool.submit(fleet.ask, (*NAMES, "late")[i % 5], 32) for i in range(60)]
        waits[10].result()
        fleet.servers()[0].kill()
        answers = Counter(each.result().status_code for each in waits)
    assert answers == {200: 60}
    eventually(lambda: fleet.ready() == 2)
    experts = {each["id"]: each for each in fleet.http("GET", "/v1/experts").json()["data"]}
    assert set(experts["late"]["replicas"]) == {"replica-0", "replica-1"}
