"""A live server's metrics, request log and trace spans, against what its clients saw themselves."""

import asyncio
import json
import os
import runpy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from deltamux.compression.artifact.manifest import read_manifest
from deltamux.compression.image.layout import slot_size

pytestmark = pytest.mark.vllm

KEY = "secret"
EXPERTS = ("math", "sql", "shell")
# A prompt's words that must appear in no log.
SECRET = "plugh"
Samples = dict[tuple[str, ...], float]
# The share of a client's time that the server must have seen too, in the best of a few rounds. On a busy
# machine a client waits for its processor, but so does the server, and not in every round; a server that
# forgot its queue or its swaps would see a fraction.
SHARE_SEEN = 0.5
ROUNDS = 8


@dataclass
class Seen:
    """What one client saw of its request; times from `time.perf_counter`."""

    expert: str
    reason: str
    outcome: str
    start: float = 0.0
    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    chunks: int = 0
    request_id: str = ""


@dataclass
class Client:
    """Sends requests and logs what comes back."""

    url: str
    log: list[Seen] = field(default_factory=list)

    async def ask(self, http: httpx.AsyncClient, model: str, **options: Any) -> Seen:
        options = dict(options)
        leave_after = options.pop("leave_after", None)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": options.pop("text", "what is it?")}],
            "max_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
        } | options
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        seen = Seen(expert_of(model), "explicit", "aborted", time.perf_counter())
        self.log.append(seen)
        url = f"{self.url}/v1/chat/completions"
        try:
            async with http.stream("POST", url, json=body) as response:
                await self._read(seen, response, leave_after)
        except httpx.ReadTimeout:
            pass  # a client that lost its patience
        return seen

    async def _read(self, seen: Seen, response: httpx.Response, leave_after: int | None) -> None:
        seen.expert = response.headers.get("x-deltamux-expert", seen.expert)
        seen.reason = response.headers.get("x-deltamux-reason", seen.reason)
        if response.status_code != 200:
            await response.aread()
            seen.outcome = outcome_of(response.status_code)
            return
        if "text/event-stream" not in response.headers["content-type"]:
            content = json.loads(await response.aread())
            self._finish(seen, content["id"], content["usage"])
            seen.last = time.perf_counter()
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                seen.outcome = outcome_of(event["error"]["code"])
                return
            if event["choices"]:
                seen.last = time.perf_counter()
                seen.first = seen.first or seen.last
                seen.chunks += 1
            if event.get("usage"):
                self._finish(seen, event["id"], event["usage"])
            if leave_after and seen.chunks > leave_after:
                return

    def _finish(self, seen: Seen, request_id: str, usage: dict[str, int]) -> None:
        seen.outcome = "ok"
        seen.request_id = request_id
        seen.prompt_tokens = usage["prompt_tokens"]
        seen.generated_tokens = usage["completion_tokens"]

    def run(self, asks: list[tuple[str, dict[str, Any]]]) -> list[Seen]:
        """All of them, six at a time; returns what was seen of these."""
        before = len(self.log)
        turn = asyncio.Semaphore(6)

        async def ask(http: httpx.AsyncClient, model: str, options: dict[str, Any]) -> None:
            async with turn:
                await self.ask(http, model, **options)

        async def together() -> None:
            headers = {"Authorization": f"Bearer {KEY}"}
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(headers=headers, timeout=300, limits=limits) as http:
                await asyncio.gather(*(ask(http, *each) for each in asks))

        asyncio.run(together())
        return self.log[before:]


def outcome_of(code: int) -> str:
    return "unavailable" if code == 503 else "invalid"


def expert_of(model: str) -> str:
    """The label of a request whose response tells nothing."""
    return {"tiny": "base"}.get(model, model if model in (*EXPERTS, "broken") else "unknown")


@pytest.fixture
def client(live: Any) -> Iterator[Client]:
    """A client that runs as soon as it has something to read, where the system allows that.

    The engine keeps its processors busy, and kernels exist that let others wait for seconds then: a
    client that does not run can neither leave in time nor log times.
    """
    policy = os.sched_getscheduler(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    yield Client(live.server.url)
    with suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(0))


def settled(live: Any, is_settled: Callable[[Samples], bool]) -> Samples:
    """The metrics once they say what is awaited; the last ones if they never do."""
    end = time.monotonic() + 300
    while not is_settled(samples := live.samples()) and time.monotonic() < end:
        time.sleep(0.1)
    return samples


def no_request_is_open(samples: Samples) -> bool:
    """Whether every request that was counted has ended."""
    opened = sum(v for k, v in samples.items() if k[0] == "deltamux_requests_total")
    ended = sum(v for k, v in samples.items() if k[0] == "deltamux_request_outcomes_total")
    return opened == ended


class Growth:
    """How much each metric grew."""

    def __init__(self, before: Samples, after: Samples) -> None:
        self.by_key = {key: value - before.get(key, 0) for key, value in after.items()}

    def of(self, name: str, **labels: str) -> float:
        return self.by_key.get((name, *sorted(f"{k}={v}" for k, v in labels.items())), 0)

    def nonzero(self, name: str) -> dict[tuple[str, ...], float]:
        return {k[1:]: v for k, v in self.by_key.items() if k[0] == name and v}


def mixed(count: int, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    asks = [(model, dict(options)) for model in (*EXPERTS, "tiny") for _ in range(count)]
    words = ["select the column of rows", "list the files of folder", "hello the story of music"]
    return asks + [("auto", options | {"text": f"{text} {SECRET}"}) for text in words]


@pytest.mark.parametrize("stream", [True, False])
def test_the_counters_agree_with_the_log_of_concurrent_clients(
    live: Any, client: Client, stream: bool
) -> None:
    best: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        before = live.samples()
        log = client.run(mixed(4, stream=stream, max_tokens=40))
        grown = Growth(before, settled(live, no_request_is_open))
        check_counts(grown, log)
        for key, share in shares_seen(grown, log, stream).items():
            best[key] = max(share, best.get(key, share))
        if min(best.values()) > SHARE_SEEN:
            break
    assert min(best.values()) > SHARE_SEEN, best


def check_counts(grown: Growth, log: list[Seen]) -> None:
    """What can be counted agrees exactly."""
    assert {seen.outcome for seen in log} == {"ok"}
    requests = Counter((f"expert={seen.expert}", f"reason={seen.reason}") for seen in log)
    assert grown.nonzero("deltamux_requests_total") == requests
    assert {key[1] for key in requests} >= {"reason=explicit", "reason=router", "reason=abstain"}
    assert grown.nonzero("deltamux_request_outcomes_total") == {
        (expert, "outcome=ok", reason): count for (expert, reason), count in requests.items()
    }
    for expert in (*EXPERTS, "base"):
        mine = [seen for seen in log if seen.expert == expert]
        generated = sum(seen.generated_tokens for seen in mine)
        prompts = sum(seen.prompt_tokens for seen in mine)
        assert grown.of("deltamux_tokens_total", expert=expert, kind="generated") == generated
        assert grown.of("deltamux_tokens_total", expert=expert, kind="prompt") == prompts
        for name in ("ttft", "e2e"):
            assert grown.of(f"deltamux_{name}_seconds_count", expert=expert) == len(mine)
        assert grown.of("deltamux_itl_seconds_count", expert=expert) == generated - len(mine)
    routed = grown.nonzero("deltamux_router_decisions_total")
    assert sum(routed.values()) == 3
    assert grown.of("deltamux_router_seconds_count") == 3
    assert grown.of("deltamux_router_confidence_count") == 3


def shares_seen(grown: Growth, log: list[Seen], stream: bool) -> dict[tuple[str, str], float]:
    """By expert and metric: how much of the clients' time the server's sums hold.

    A client starts earlier and ends later, so it never sees less.
    """
    shares = {}
    for expert in (*EXPERTS, "base"):
        mine = [seen for seen in log if seen.expert == expert]
        durations = {"e2e": sum(seen.last - seen.start for seen in mine)}
        if stream:
            durations["ttft"] = sum(seen.first - seen.start for seen in mine)
        for name, seconds in durations.items():
            server = grown.of(f"deltamux_{name}_seconds_sum", expert=expert)
            assert 0 < server <= seconds + 1e-3 * len(mine)
            shares[expert, name] = server / seconds
        if stream:
            # The gaps between a request's tokens sum to the time between its first and its last.
            gaps = sum(seen.last - seen.first for seen in mine)
            server = grown.of("deltamux_itl_seconds_sum", expert=expert)
            shares[expert, "itl"] = min(gaps, server) / max(gaps, server)
    return shares


def test_several_answers_to_one_prompt_are_one_request(live: Any, client: Client) -> None:
    before = live.samples()
    (seen,) = client.run([("sql", {"n": 3, "temperature": 1, "max_tokens": 10})])
    grown = Growth(before, settled(live, no_request_is_open))
    assert grown.of("deltamux_requests_total", expert="sql", reason="explicit") == 1
    assert grown.of("deltamux_ttft_seconds_count", expert="sql") == 1
    assert grown.of("deltamux_tokens_total", expert="sql", kind="prompt") == seen.prompt_tokens
    generated = grown.of("deltamux_tokens_total", expert="sql", kind="generated")
    assert generated == seen.generated_tokens == 30
    assert grown.of("deltamux_itl_seconds_count", expert="sql") == 30 - 3


def test_requests_that_clients_leave_are_counted_as_aborted(live: Any, client: Client) -> None:
    before = live.samples()
    long = {"max_tokens": 400}
    left = [(model, long | {"stream": True, "leave_after": 5}) for model in ("sql", "tiny", "sql")]
    left += [("shell", long) for _ in range(2)]
    headers = {"Authorization": f"Bearer {KEY}"}

    async def leave() -> None:
        async with (
            httpx.AsyncClient(headers=headers, timeout=300) as patient,
            httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(300, read=0.2)) as hasty,
        ):
            await asyncio.gather(
                *(
                    client.ask(patient if "stream" in options else hasty, model, **options)
                    for model, options in left
                )
            )

    asyncio.run(leave())
    kept = client.run([("math", {"stream": True})])
    after = settled(live, no_request_is_open)
    grown = Growth(before, after)
    assert grown.nonzero("deltamux_request_outcomes_total") == {
        ("expert=sql", "outcome=aborted", "reason=explicit"): 2,
        ("expert=base", "outcome=aborted", "reason=explicit"): 1,
        ("expert=shell", "outcome=aborted", "reason=explicit"): 2,
        ("expert=math", "outcome=ok", "reason=explicit"): 1,
    }
    # What a client did not wait for may have been generated, never less than what it saw.
    seen = sum(each.chunks for each in client.log if each.expert == "sql")
    generated = grown.of("deltamux_tokens_total", expert="sql", kind="generated")
    assert seen - 2 * 2 <= generated <= 2 * 400
    assert grown.of("deltamux_ttft_seconds_count", expert="sql") == 2
    assert grown.of("deltamux_e2e_seconds_count", expert="sql") == 0
    assert grown.of("deltamux_e2e_seconds_count", expert="math") == len(kept) == 1
    open_now = {k: v for k, v in after.items() if k[0] == "deltamux_requests_in_flight"}
    assert not any(open_now.values())


def test_refused_requests_are_counted_under_fixed_names(live: Any, client: Client) -> None:
    before = live.samples()
    log = client.run(
        [
            ('nobody"} 1\nevil{a="', {}),
            ("nobody else", {"stream": True}),
            ("math", {"text": "x" * 600}),
            ("tiny", {"text": "x" * 600, "stream": True}),
            ("broken", {}),
            ("auto", {"text": f"select the column of rows {'y' * 600}"}),
        ]
    )
    grown = Growth(before, settled(live, no_request_is_open))
    counted = Counter(
        (f"expert={seen.expert}", f"outcome={seen.outcome}", f"reason={seen.reason}")
        for seen in log
    )
    assert counted == {
        ("expert=unknown", "outcome=invalid", "reason=explicit"): 2,
        ("expert=math", "outcome=invalid", "reason=explicit"): 1,
        ("expert=base", "outcome=invalid", "reason=explicit"): 1,
        ("expert=broken", "outcome=unavailable", "reason=explicit"): 1,
        ("expert=sql", "outcome=invalid", "reason=router"): 1,
    }
    assert grown.nonzero("deltamux_request_outcomes_total") == counted
    assert not grown.nonzero("deltamux_tokens_total")
    page = live.http("GET", "/metrics").text
    assert "nobody" not in page
    assert "evil" not in page


def test_overload_is_refused_and_a_scrape_goes_on(live: Any, client: Client) -> None:
    before = live.samples()
    scrapes: list[int] = []

    async def scrape(http: httpx.AsyncClient, done: asyncio.Event) -> None:
        while not done.is_set():
            scrapes.append((await http.get(f"{live.server.url}/metrics")).status_code)

    async def scene() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(headers=headers, timeout=300, limits=limits) as http:
            done = asyncio.Event()
            scraping = [asyncio.create_task(scrape(http, done)) for _ in range(4)]
            asks = [("tiny", {"stream": i % 2 == 0, "max_tokens": 100}) for i in range(60)]
            await asyncio.gather(*(client.ask(http, model, **each) for model, each in asks))
            done.set()
            await asyncio.gather(*scraping)

    asyncio.run(scene())
    grown = Growth(before, settled(live, no_request_is_open))
    outcomes = Counter(seen.outcome for seen in client.log)
    assert outcomes["ok"] >= 1
    assert outcomes["unavailable"] >= 1
    for outcome, count in outcomes.items():
        labels = {"expert": "base", "reason": "explicit", "outcome": outcome}
        assert grown.of("deltamux_request_outcomes_total", **labels) == count
    assert set(scrapes) == {200}
    assert live.http("GET", "/health").status_code == 200


def test_the_wait_for_a_swap_is_what_the_worker_measured(live: Any, client: Client) -> None:
    before = live.samples()
    # math keeps its slot, so the others take turns in the second one.
    for name in ("sql", "shell", "sql", "shell", "shell", "math"):
        client.run([(name, {"max_tokens": 2})])
    grown = Growth(before, settled(live, no_request_is_open))
    waits = {
        name: grown.of("deltamux_swap_wait_seconds_count", expert=name)
        - grown.of("deltamux_swap_wait_seconds_bucket", expert=name, le="0.0")
        for name in EXPERTS
    }
    swaps = {name: grown.of("deltamux_swaps_total", expert=name, tier="slot") for name in EXPERTS}
    assert waits == swaps
    assert (swaps["math"], swaps["shell"]) == (0, 2)
    waited = sum(grown.of("deltamux_swap_wait_seconds_sum", expert=name) for name in EXPERTS)
    moved = grown.of("deltamux_swap_seconds_sum", tier="slot")
    # The wait is the move with the choice of a slot around it, and part of the time to the first token.
    first_tokens = sum(grown.of("deltamux_ttft_seconds_sum", expert=name) for name in EXPERTS)
    assert moved <= waited <= first_tokens
    assert grown.of("deltamux_swap_wait_seconds_count", expert="base") == 0


def test_the_kinds_of_memory_add_up_to_what_the_system_reports(live: Any) -> None:
    samples = live.samples()
    own = psutil.Process(live.server.process.pid)
    resident = sum(p.memory_info().rss for p in [own, *own.children(recursive=True)])
    kinds = {k[1]: v for k, v in samples.items() if k[0] == "deltamux_memory_bytes"}
    assert set(kinds) == {
        f"kind={kind}" for kind in ("base", "slots", "host_cache", "kv_cache", "process")
    }
    assert all(value > 0 for value in kinds.values())
    assert sum(kinds.values()) == pytest.approx(resident, rel=0.05)
    assert samples["deltamux_memory_used_bytes", "place=host"] == pytest.approx(resident, rel=0.05)
    limit = samples["deltamux_memory_limit_bytes", "place=host"]
    assert resident < limit <= psutil.virtual_memory().total
    # kv_cache_memory_bytes is 64 MiB, of which vLLM makes whole blocks.
    assert kinds["kind=kv_cache"] == pytest.approx(2**26, rel=0.01)


def request_lines(live: Any) -> list[dict[str, Any]]:
    lines = live.server.log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"event": "request"')]


def test_each_request_leaves_one_line_of_json_without_its_prompt(live: Any, client: Client) -> None:
    begun = len(request_lines(live))
    asks = [
        ("math", {"stream": True, "text": f"add {SECRET}"}),
        ("auto", {"text": f"select the column of rows {SECRET}"}),
        ("nobody", {"text": SECRET}),
    ]
    log = [client.run([ask])[0] for ask in asks]
    settled(live, no_request_is_open)
    math, sql, nobody = request_lines(live)[begun:]
    for line, seen in ((math, log[0]), (sql, log[1])):
        assert line["request_id"] == seen.request_id
        assert (line["expert"], line["reason"]) == (seen.expert, seen.reason)
        assert (line["prompt_tokens"], line["generated_tokens"]) == (
            seen.prompt_tokens,
            seen.generated_tokens,
        )
        assert line["outcome"] == "ok"
        assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["e2e_seconds"]
        assert 0 <= line["swap_wait_seconds"] <= line["ttft_seconds"]
    assert (sql["domain"], math["domain"]) == ("sql", "math")
    assert 0 < sql["confidence"] <= 1
    assert (nobody["expert"], nobody["outcome"]) == ("unknown", "invalid")
    assert nobody["ttft_seconds"] is None
    assert SECRET not in live.server.log.read_text(errors="replace")


def test_spans_say_who_answered_and_how_long_a_swap_took(
    live: Any, client: Client, eventually: Callable[..., Any]
) -> None:
    client.run([("shell", {"max_tokens": 2})])
    routed = client.run([("auto", {"text": "select the column of rows", "max_tokens": 2})])[0]

    def span() -> dict[str, Any] | None:
        named = (each for each in live.traces.spans if each["name"] == "llm_request")
        return next((s for s in named if s["gen_ai.request.id"] == routed.request_id), None)

    found = eventually(span)
    assert found["deltamux.expert"] == found["deltamux.domain"] == "sql"
    assert found["deltamux.reason"] == "router"
    assert found["deltamux.swap_wait_seconds"] > 0
    assert SECRET not in json.dumps(live.traces.spans)


def test_experts_tell_their_tier_size_last_use_and_requests(live: Any, client: Client) -> None:
    start = time.time()
    client.run([("math", {"max_tokens": 2})])
    client.run([("sql", {"max_tokens": 2})])
    listed = {each["id"]: each for each in live.http("GET", "/v1/experts").json()["data"]}
    assert start <= listed["sql"]["last_used"] <= time.time()
    assert listed["sql"]["tier"] == listed["math"]["tier"] == "slot"
    assert listed["sql"]["bytes"] == (live.folder / "sql" / "model.safetensors").stat().st_size
    assert 0 < listed["sql"]["bits_per_weight"] < 5
    assert (listed["sql"]["running"], listed["sql"]["waiting"]) == (0, 0)
    assert listed["broken"]["last_used"] is None or listed["broken"]["error"]

    async def watch() -> dict[str, int]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(headers=headers, timeout=300) as http:
            options = {"stream": True, "max_tokens": 400}
            asks = [asyncio.create_task(client.ask(http, "sql", **options)) for _ in range(12)]
            most = {"running": 0, "waiting": 0}
            while not all(ask.done() for ask in asks):
                seen = (await http.get(f"{live.server.url}/v1/experts/sql")).json()
                most = {state: max(most[state], seen[state]) for state in most}
            return most

    most = asyncio.run(watch())
    # max_num_seqs is 8: of 12 requests some have to wait.
    assert 1 <= most["running"] <= 12
    assert most["waiting"] >= 4


def test_the_router_tells_the_mix_that_it_was_fitted_on(live: Any) -> None:
    samples = live.samples()
    mix = {k[1]: v for k, v in samples.items() if k[0] == "deltamux_router_fit_domain_ratio"}
    assert mix == {f"domain={d}": 0.25 for d in (*EXPERTS, "general")}
    config = json.loads((live.folder / "router" / "router_config.json").read_text())
    expected = config["heldout"]["abstained"]
    assert samples["deltamux_router_fit_abstention_ratio",] == pytest.approx(expected)


def test_a_server_stays_ready_while_others_need_the_slot_of_a_pinned_expert(
    live: Any, client: Client
) -> None:
    before = live.samples()
    both = [(name, {"max_tokens": 100}) for name in ("sql", "shell") for _ in range(3)]
    client.run(both)
    ready = live.http("GET", "/v1/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "reasons": []})
    moves = Growth(before, settled(live, no_request_is_open))
    assert moves.of("deltamux_swaps_total", expert="math", tier="slot") == 0
    # One of the two may be in the other slot already.
    moved = [
        moves.of("deltamux_swaps_total", expert=each, tier="slot") for each in ("sql", "shell")
    ]
    assert sum(moved) >= 1
    assert httpx.get(f"{live.server.url}/health").status_code == 200
    # Who has no key learns that, and no reasons.
    assert httpx.get(f"{live.server.url}/v1/ready").json() == {"ready": True}


def test_a_server_that_is_not_ready_says_what_is_missing() -> None:
    from deltamux.serve.api.ready import not_ready

    class Engine:
        async def check_health(self) -> None:
            raise RuntimeError("the core has gone")

    class Registry(dict[str, SimpleNamespace]):
        def __iter__(self) -> Any:
            return iter(self.values())

        def status_of(self, expert: SimpleNamespace) -> SimpleNamespace:
            return expert.status

    names = {"math": "host", "sql": "slot", "shell": "disk"}
    experts = Registry()
    for name, tier in names.items():
        status = SimpleNamespace(tier=tier)
        pinned = name != "shell"
        experts[name] = SimpleNamespace(name=name, pinned=pinned, error=None, status=status)
    settings = SimpleNamespace(router=object(), experts=())
    route = SimpleNamespace(error="not for this tokenizer")
    server: Any = SimpleNamespace(engine=Engine(), registry=experts, settings=settings, route=route)
    assert asyncio.run(not_ready(server)) == [
        "the engine is not alive: the core has gone",
        "the router is not loaded: not for this tokenizer",
        "the pinned expert 'math' is not in a slot: host",
    ]


def test_the_sizing_tool_knows_what_the_server_allocates(live: Any) -> None:
    path = Path(__file__).parents[2] / "docker" / "tools" / "sizing.py"
    tool = runpy.run_path(str(path))
    config = json.loads((live.folder / "base" / "config.json").read_text())
    samples = live.samples()
    assert samples["deltamux_memory_bytes", "kind=base"] == tool["sizes"](config, itemsize=4).base


def test_slots_are_as_large_as_the_largest_configured_expert(live: Any) -> None:
    images = [
        read_manifest(live.folder / name).totals.slot_bytes for name in ("math", "sql", "shell")
    ]
    slots = live.samples()["deltamux_memory_bytes", "kind=slots"]
    assert slots == 2 * slot_size(max(images))
