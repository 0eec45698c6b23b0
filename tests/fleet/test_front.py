"""The fleet's endpoint over replicas that are functions: who is asked, what is tried again, what reaches everybody."""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltamux.serve.fleet.front import Front
from deltamux.serve.fleet.placement import order
from deltamux.serve.fleet.roster import Change, Known, Roster
from deltamux.serve.fleet.settings import FleetSettings

NAMES = ("math", "sql", "shell", "poems", "law")


class Local:
    """A roster that is here."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    async def known(self) -> Known:
        return self.roster.known()

    async def note(self, change: Change) -> None:
        self.roster.note(change)


class Fake:
    """A replica: what it was asked, and how it fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.experts = set(NAMES)
        self.dead = self.dies_in_answers = self.dies_in_streams = self.engine_dead = False
        self.refuses = False
        self.wait: asyncio.Event | None = None

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.dead:
            raise httpx.ConnectError("refused")
        path, content = request.url.path, json.loads(request.content or b"null")
        if path == "/health":
            return httpx.Response(503 if self.engine_dead else 200)
        if path == "/v1/experts" and request.method == "GET":
            return httpx.Response(200, json={"data": self._experts(), "slots": 2})
        if path == "/metrics":
            page = (
                '# HELP a_total A.\n# TYPE a_total counter\na_total{x="1"} 2\n# TYPE b gauge\nb 1\n'
            )
            return httpx.Response(200, text=page)
        self.asked.append((request.method, path, content))
        if path.startswith("/v1/experts"):
            return self._change(request.method, path, content)
        if path == "/v1/route":
            said = {"expert": "sql", "domain": "sql", "confidence": 0.9, "reason": "router"}
            return httpx.Response(200, json=said)
        if self.wait is not None:
            await self.wait.wait()
        return self._generated(content)

    def _experts(self) -> list[dict[str, Any]]:
        rest = {"slot": None, "pinned": False, "last_used": None, "content": "c", "error": None}
        counts = {"running": 1, "waiting": 0}
        return [{"id": n, "tier": "host", **rest, **counts} for n in sorted(self.experts)]

    def _change(self, method: str, path: str, content: Any) -> httpx.Response:
        if self.refuses:
            return httpx.Response(400, json={"error": {"message": "no"}})
        if method == "POST" and path == "/v1/experts":
            self.experts.add(content["name"])
            return httpx.Response(201, json={"id": content["name"]})
        self.experts.discard(path.rpartition("/")[2])
        return httpx.Response(200, json={"deleted": True})

    def _generated(self, content: Any) -> httpx.Response:
        if self.engine_dead:
            return httpx.Response(500, json={"error": {"message": "EngineDeadError"}})
        if self.dies_in_answers:
            self.dead = True
            raise httpx.RemoteProtocolError("closed")
        if content and content.get("stream"):
            kind = {"content-type": "text/event-stream"}
            return httpx.Response(200, headers=kind, content=self._stream())
        return httpx.Response(200, json={"model": content["model"]})

    async def _stream(self) -> AsyncIterator[bytes]:
        if self.dies_in_streams:
            self.dead = True
            raise httpx.ReadError("reset")
        yield b"data: 1\n\n"
        yield b"data: [DONE]\n\n"


class Site:
    """A fleet of fakes."""

    def __init__(self, replicas: int = 3, state: Path | None = None, **settings: Any) -> None:
        self.fakes = {f"replica-{number}": Fake() for number in range(replicas)}
        self.roster = Roster(state)
        for name in self.fakes:
            assert self.roster.join(f"id-{name}", f"http://{name}") == name
        given = {"server": Path("deltamux.yaml"), "patience": 0.3} | settings
        transport = httpx.MockTransport(self._reached)
        fleet = FleetSettings.model_validate(given)
        self.front = Front(fleet, Local(self.roster), None, transport)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.front.app), base_url="http://fleet"
        )

    async def _reached(self, request: httpx.Request) -> httpx.Response:
        said = await self.fakes[request.url.host](request)
        if not isinstance(said.stream, httpx.ByteStream):
            return said

        async def body() -> AsyncIterator[bytes]:
            yield said.content

        return httpx.Response(said.status_code, headers=said.headers, content=body())

    async def ask(self, model: str, **more: Any) -> httpx.Response:
        content = {"model": model, "prompt": "hello"} | more
        return await self.client.post("/v1/completions", json=content)

    def home(self, model: str) -> str:
        names = list(self.fakes)
        return names[order([model], names)[0, 0]]


def on(site: Site, work: Any) -> None:
    async def run() -> None:
        await site.front.look()
        await work(site)

    # A thread of its own: the browser of the console's tests leaves a loop in the main one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, run()).result()


def test_each_expert_has_its_replica_and_the_base_goes_anywhere() -> None:
    async def work(site: Site) -> None:
        for name in NAMES * 2:
            said = await site.ask(name)
            assert said.headers["x-deltamux-replica"] == site.home(name)
            assert said.json() == {"model": name}
        assert (await site.ask("base")).status_code == 200

    on(Site(), work)


def test_auto_is_decided_once() -> None:
    async def work(site: Site) -> None:
        said = await site.ask("auto")
        assert said.json() == {"model": "sql"}
        assert said.headers["x-deltamux-reason"] == "router"
        assert said.headers["x-deltamux-replica"] == site.home("sql")
        asked = [path for fake in site.fakes.values() for _, path, _ in fake.asked]
        assert sorted(asked) == ["/v1/completions", "/v1/route"]

    on(Site(), work)


def test_a_full_replica_leaves_requests_to_the_next() -> None:
    async def work(site: Site) -> None:
        go = asyncio.Event()
        for fake in site.fakes.values():
            fake.wait = go
        tasks = [asyncio.ensure_future(site.ask("math")) for _ in range(6)]
        await asyncio.sleep(0.2)
        counts = sorted(len(fake.asked) for fake in site.fakes.values())
        go.set()
        assert [each.status_code for each in await asyncio.gather(*tasks)] == [200] * 6
        assert counts == [0, 3, 3]
        assert site.front.table.spilled == 3

    on(Site(room=3), work)


@pytest.mark.parametrize(
    ("fault", "stream"),
    [
        ("dead", False),
        ("dies_in_answers", False),
        ("engine_dead", False),
        ("dies_in_streams", True),
    ],
)
def test_a_request_that_has_no_answer_yet_goes_to_another(fault: str, stream: bool) -> None:
    async def work(site: Site) -> None:
        setattr(site.fakes[site.home("math")], fault, True)
        said = await site.ask("math", stream=stream)
        assert said.status_code == 200
        assert said.headers["x-deltamux-replica"] != site.home("math")
        if stream:
            assert said.text.endswith("[DONE]\n\n")
        assert all(each.opened == 0 for each in site.front.table.all)
        # It is back as soon as it answers again.
        fake = site.fakes[site.home("math")]
        fake.dead = fake.dies_in_answers = fake.engine_dead = fake.dies_in_streams = False
        await site.front.look()
        again = await site.ask("math")
        assert again.headers["x-deltamux-replica"] == site.home("math")

    on(Site(), work)


def test_a_request_that_ends_replicas_does_not_end_all() -> None:
    async def work(site: Site) -> None:
        for fake in site.fakes.values():
            fake.dies_in_answers = True
        assert (await site.ask("math")).status_code == 503
        assert sum(fake.dead for fake in site.fakes.values()) == 3

    on(Site(5), work)


def test_nobody_there_is_said_after_a_while() -> None:
    async def work(site: Site) -> None:
        said = await site.ask("math")
        assert said.status_code == 503
        assert "no replica" in said.json()["error"]["message"]
        assert (await site.client.get("/v1/ready")).status_code == 503

    on(Site(0), work)


def test_a_change_reaches_everybody_and_those_who_come_later(tmp_path: Path) -> None:
    async def work(site: Site) -> None:
        body = {"name": "chess", "path": "/experts/chess"}
        added = await site.client.post("/v1/experts", json=body)
        assert added.status_code == 201
        assert added.json()["replicas"] == dict.fromkeys(site.fakes, 201)
        assert all("chess" in fake.experts for fake in site.fakes.values())
        assert (await site.client.delete("/v1/experts/law")).status_code == 200
        site.fakes["replica-3"] = Fake()
        site.roster.join("id-late", "http://replica-3")
        await site.front.look()
        assert site.fakes["replica-3"].experts == {*NAMES, "chess"} - {"law"}

    on(Site(state=tmp_path / "state.json"), work)
    # Another fleet over the same state knows it, too.
    keys = {change.key for change in Roster(tmp_path / "state.json").known().changes}
    assert keys == {"expert:chess", "expert:law"}


def test_a_refused_change_is_not_kept() -> None:
    async def work(site: Site) -> None:
        site.fakes["replica-1"].refuses = True
        said = await site.client.post("/v1/experts", json={"name": "chess", "path": "x"})
        assert said.status_code == 400
        assert said.json()["replicas"]["replica-1"] == 400
        assert site.roster.known().changes == []

    on(Site(), work)


def test_pages_tell_of_all_replicas() -> None:
    async def work(site: Site) -> None:
        page = (await site.client.get("/metrics")).text
        assert 'a_total{replica="replica-0",x="1"} 2' in page
        assert 'b{replica="replica-2"} 1' in page
        assert page.count("# TYPE a_total") == 1
        assert 'deltamux_fleet_ready{replica="replica-1"} 1.0' in page
        experts = (await site.client.get("/v1/experts")).json()
        assert experts["slots"] == 6
        (math,) = [each for each in experts["data"] if each["id"] == "math"]
        assert math["running"] == 3
        assert math["replicas"]["replica-1"]["tier"] == "host"

    on(Site(), work)


def test_seats_are_taken_over() -> None:
    roster = Roster()
    assert [roster.join(name, "u") for name in ("a", "b", "a")] == [
        "replica-0",
        "replica-1",
        "replica-0",
    ]
    roster.leave("a")
    assert roster.join("c", "u") == "replica-0"


def test_a_body_that_no_server_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltamux.serve.fleet import asked

    async def work(site: Site) -> None:
        assert (await site.ask("math", prompt="x" * 200)).status_code == 413
        assert (await site.ask("math")).status_code == 200

    monkeypatch.setattr(asked, "MOST_BODY_BYTES", 150)
    on(Site(), work)
