"""Debian's Prometheus over a live server under load: targets, rules, and every panel's expressions."""

import asyncio
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deltamux.serve.launch import free_port

pytestmark = pytest.mark.vllm

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "deltamux.json").read_text())
KEY = "secret"
# How long the load goes on where a panel never gets data; its test then says which.
PATIENCE_SECONDS = 180.0
RECORDED = [
    rule["record"]
    for group in yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
# What Grafana fills in; the scrape interval here is 1 s.
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*", "$expert": ".*"}
PROMPTS = (
    "add the number of total",
    "select the column of rows",
    "list the files of folder",
    "hello the story of music",
)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str
    start: float

    def get(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=300).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def last(self, expression: str) -> list[float]:
        """The values of an expression since the load began, NaN left out."""
        end = time.time()
        found = self.get("query_range", query=expression, start=self.start, end=end, step="1s")
        values = [float(value) for series in found["result"] for _, value in series["values"]]
        return [value for value in values if not math.isnan(value)]


async def load(url: str, is_enough: Callable[[], bool]) -> None:
    """Requests of every kind, a few at a time, until it is enough."""
    done = asyncio.Event()
    headers = {"Authorization": f"Bearer {KEY}"}

    async def client(http: httpx.AsyncClient, number: int) -> None:
        turn = number
        while not done.is_set():
            turn += 1
            model = ("auto", "math", "auto", "sql", "shell", "auto", "tiny", "broken")[turn % 8]
            body = {
                "model": model,
                "messages": [{"role": "user", "content": PROMPTS[turn % 4]}],
                "max_tokens": 16,
                "ignore_eos": True,
                "stream": turn % 2 == 0,
            }
            answer = await http.post(f"{url}/v1/chat/completions", json=body)
            assert answer.status_code == (503 if model == "broken" else 200)

    async def watch() -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and not await asyncio.to_thread(is_enough):
            await asyncio.sleep(1)
        done.set()

    async with httpx.AsyncClient(headers=headers, timeout=300) as http:
        await asyncio.gather(watch(), *(client(http, number) for number in range(4)))


@pytest.fixture(scope="module")
def prometheus(
    live: Any,
    debian_prometheus: Path,
    tmp_path_factory: pytest.TempPathFactory,
    eventually: Callable[..., Any],
) -> Iterator[Prometheus]:
    """The shipped configuration with the server's own address, scraped every second, under load.

    The load goes on until every panel and every recorded rule has data: how many scrapes and
    evaluations that takes depends on the machine.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    for name in ("rules.yml", "alerts.yml"):
        (folder / name).write_text((DOCKER / "prometheus" / name).read_text())
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    port = free_port()
    targets = {
        "deltamux": live.server.url.removeprefix("http://"),
        "prometheus": f"127.0.0.1:{port}",
    }
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = [targets[job["job_name"]]]
    times = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    config["global"] = times
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        debian_prometheus / "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            found = Prometheus(f"http://127.0.0.1:{port}", time.time())
            eventually(lambda: is_ready(found))
            asyncio.run(load(live.server.url, lambda: shows_everything(found)))
            yield found
        finally:
            process.terminate()


def is_ready(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def shows_everything(prometheus: Prometheus) -> bool:
    wanted = [*RECORDED, *(filled_in(panel.values[0]) for panel in panels())]
    return all(prometheus.last(expression) for expression in wanted)


def panels() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]


def filled_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def test_every_target_is_up(prometheus: Prometheus, eventually: Callable[..., Any]) -> None:
    up = {("deltamux", "up", ""), ("prometheus", "up", "")}

    def seen() -> set[tuple[str, str, str]]:
        targets = prometheus.get("targets")["activeTargets"]
        return {(each["labels"]["job"], each["health"], each["lastError"]) for each in targets}

    # A scrape of a busy second may have taken longer than the second it has.
    eventually(lambda: seen() == up)


def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 15
    assert {rule["health"] for rule in rules} == {"ok"}
    for rule in rules:
        if rule["type"] == "recording":
            assert prometheus.last(rule["name"]), rule["name"]
        else:
            assert rule["state"] != "firing", rule["name"]


@pytest.mark.parametrize("expression", panels())
def test_a_panels_expression_returns_data(prometheus: Prometheus, expression: str) -> None:
    assert prometheus.last(filled_in(expression))


def test_the_dashboards_variables_find_instance_and_experts(
    prometheus: Prometheus, live: Any
) -> None:
    values = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] != "query":
            continue
        query = filled_in(variable["definition"])
        selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        values[variable["name"]] = prometheus.get(f"label/{label}/values", **{"match[]": selector})
    assert values["instance"] == [live.server.url.removeprefix("http://")]
    assert set(values["expert"]) >= {"math", "sql", "shell", "base", "broken"}


def test_prometheus_has_what_the_server_counted(
    prometheus: Prometheus, live: Any, eventually: Callable[..., Any]
) -> None:
    def stored(name: str) -> float:
        return float(prometheus.get("query", query=f"sum({name})")["result"][0]["value"][1])

    for name in ("deltamux_requests_total", "deltamux_tokens_total", "deltamux_swaps_total"):
        counted = sum(value for key, value in live.samples().items() if key[0] == name)
        eventually(partial(lambda name, counted: stored(name) == counted, name, counted))
