"""How a server ends: asked to with requests running, by the death of its engine; and how it starts again."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from deltamux.serve.demo.server import Server, deltamux_serve, running_server

pytestmark = pytest.mark.vllm

TOKENS = 300


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: SimpleNamespace, text_file: Path
) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    checkpoints.write_parts(folder, text_file, ("math", "sql", "shell"))
    found: Path = checkpoints.write_config(folder, {})
    return found


@pytest.fixture
def server(config: Path, checkpoints: SimpleNamespace, tmp_path: Path) -> Iterator[Server]:
    command = deltamux_serve(config)
    with running_server(command, tmp_path / "server.log", checkpoints.environment) as running:
        yield running


def body(model: str, **changes: Any) -> dict[str, Any]:
    asked = {"model": model, "prompt": "x", "max_tokens": TOKENS, "temperature": 0}
    return asked | {"ignore_eos": True} | changes


def engine_of(server: Server) -> psutil.Process:
    """The process of the engine core: the parent of the worker's, or the only child that runs vLLM."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(
        each for each in children if "EngineCore" in " ".join([each.name(), *each.cmdline()])
    )


def test_a_server_that_is_asked_to_end_finishes_what_runs_and_starts_again(
    server: Server, config: Path, checkpoints: SimpleNamespace, tmp_path: Path
) -> None:
    started = threading.Barrier(5)

    def stream(model: str) -> tuple[int, str]:
        """Tokens of an answer, and its end."""
        asked = body(model, stream=True)
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=asked, timeout=300) as answer:
            parts = answer.iter_bytes()
            content = next(parts)
            started.wait(300)
            content += b"".join(parts)
        lines = content.split(b"\n")
        chunks = [json.loads(each[6:]) for each in lines if each.startswith(b"data: {")]
        found = [chunk["choices"][0] for chunk in chunks]
        return len(found), next(each["finish_reason"] for each in reversed(found))

    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(stream, model) for model in ("tiny", "math", "sql", "math")]
        started.wait(300)
        # An update is under way as well.
        update = {"name": "math", "path": str(config.parent / "sql")}
        pool.submit(httpx.post, f"{server.url}/v1/experts", json=update, timeout=300)
        server.process.send_signal(signal.SIGTERM)
        ends = [answer.result(300) for answer in answers]
    assert {reason for _, reason in ends} == {"length"}
    assert all(tokens > TOKENS // 2 for tokens, _ in ends)
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()
    # Nothing of the update is left: what is configured is served.
    with running_server(
        deltamux_serve(config), tmp_path / "again.log", checkpoints.environment
    ) as again:
        found = httpx.get(f"{again.url}/v1/experts/math").json()
        assert found["path"] == str(config.parent / "math")
        answer = httpx.post(
            f"{again.url}/v1/completions", json=body("math", max_tokens=4), timeout=300
        )
        assert answer.json()["model"] == "math"
        _a_second_one_is_told_who_holds_the_port(again, config, checkpoints)
        _the_engine_is_killed(again)


def _a_second_one_is_told_who_holds_the_port(
    server: Server, config: Path, checkpoints: SimpleNamespace
) -> None:
    port = server.url.rpartition(":")[2]
    ended = subprocess.run(
        [*deltamux_serve(config), "--host", "127.0.0.1", "--port", port],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **checkpoints.environment},
    )
    assert ended.returncode != 0
    assert f"the port {port} of '127.0.0.1' cannot be had: address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert httpx.get(f"{server.url}/health").status_code == 200


def _the_engine_is_killed(server: Server) -> None:
    """Requests fail at once, health is red or gone, and the status is not 0."""
    models = ("tiny", "math", "sql", "tiny")
    under_way = threading.Barrier(len(models) + 1)

    def ask_until_it_fails(model: str) -> int | None:
        assert _ask(server, model) == 200
        under_way.wait(300)
        while (status := _ask(server, model)) == 200:
            pass
        return status

    with ThreadPoolExecutor(len(models)) as pool:
        asked = [pool.submit(ask_until_it_fails, model) for model in models]
        under_way.wait(300)
        engine_of(server).kill()
        outcomes = [each.result(60) for each in asked]
    assert all(outcome in (500, 503, None) for outcome in outcomes)
    health = _status(server, "/health")
    assert health in (503, None)
    assert _status(server, "/v1/ready") in (503, None)
    assert server.process.wait(60) not in (0, None)


def _ask(server: Server, model: str) -> int | None:
    try:
        url = f"{server.url}/v1/completions"
        return httpx.post(url, json=body(model, max_tokens=500), timeout=300).status_code
    except httpx.TransportError:
        return None


def _status(server: Server, path: str) -> int | None:
    """The status of a route; None where nobody answers any more."""
    try:
        return httpx.get(f"{server.url}{path}", timeout=30).status_code
    except httpx.TransportError:
        return None
