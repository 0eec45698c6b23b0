"""vllm-router in front of two servers: with the expert as its session, each expert stays on one of them."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deltamux.serve.demo.server import Server, deltamux_serve, running_server
from deltamux.serve.launch import free_port

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm_router") is None, reason="vllm-router is not installed"
    ),
]
NAMES = ("math", "sql", "shell")


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: SimpleNamespace, text_file: Path
) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("behind")
    checkpoints.write_parts(folder, text_file, NAMES)
    experts = [{"name": name, "path": name} for name in NAMES]
    config = checkpoints.write_config(folder, {}, experts=experts)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running_server(
                    deltamux_serve(config), folder / f"{number}.log", checkpoints.environment
                )
            )
            for number in range(2)
        ]


@pytest.fixture(scope="module", params=["consistent_hash", "sticky_least_loaded"])
def router(
    request: pytest.FixtureRequest,
    servers: list[Server],
    tmp_path_factory: pytest.TempPathFactory,
    eventually: Callable[[Callable[[], Any]], Any],
) -> Iterator[str]:
    port, other = free_port(), free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--policy", request.param]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(other)]
    command += ["--worker-urls", *(server.url for server in servers)]
    log = (tmp_path_factory.mktemp("router") / "router.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    try:
        eventually(answers)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def requests_of(server: Server, scraped: Callable[[str], dict[tuple[str, ...], float]]) -> Any:
    """Requests of each expert that a server has answered."""
    found = scraped(httpx.get(f"{server.url}/metrics", timeout=60).text)
    return {
        expert: sum(
            value
            for (name, *labels), value in found.items()
            if name == "deltamux_requests_total" and f"expert={expert}" in labels
        )
        for expert in NAMES
    }


def test_an_expert_stays_where_it_is(
    router: str, servers: list[Server], checkpoints: SimpleNamespace
) -> None:
    before = [requests_of(server, checkpoints.scraped) for server in servers]
    for _ in range(4):
        for name in NAMES:
            said = httpx.post(
                f"{router}/v1/chat/completions",
                headers={"x-session-id": name},
                json={
                    "model": name,
                    "max_tokens": 4,
                    "messages": [{"role": "user", "content": "hello"}],
                },
                timeout=300,
            )
            assert said.status_code == 200
            assert said.json()["model"] == name
    after = [requests_of(server, checkpoints.scraped) for server in servers]
    for name in NAMES:
        answered = [now[name] - then[name] for now, then in zip(after, before, strict=True)]
        assert sorted(answered) == [0, 4]
