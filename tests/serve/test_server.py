"""The server as a process, driven by the `openai` client, as its users drive it."""

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from deltamux.serve.demo.server import Server, deltamux_serve, running_server

pytestmark = pytest.mark.vllm

NAMES = ("math", "sql", "shell")
KEY = "secret"
TEMPLATE = "{% for m in messages %}<|system|>an expert speaks<|end|>{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Site:
    """A running server and where its experts lie."""

    folder: Path
    server: Server
    scraped: Callable[[str], dict[tuple[str, ...], float]]

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=KEY, max_retries=0)

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.request(
            method, f"{self.server.url}{path}", headers=headers, timeout=300, **arguments
        )

    def ask(self, model: str, text: str = "what is it?", **arguments: Any) -> Any:
        return self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            **({"max_tokens": 8, "temperature": 0} | arguments),
        )

    def text(self, model: str, text: str = "what is it?", **arguments: Any) -> str:
        return self.ask(model, text, **arguments).choices[0].message.content

    def metrics(self) -> dict[tuple[str, ...], float]:
        return self.scraped(self.http("GET", "/metrics").text)


def build_site(folder: Path, make: SimpleNamespace, text: Path) -> Path:
    make.write_parts(folder, text, (*NAMES, "other"))
    foreign = make.save_base(folder / "foreign-base", seed=9)
    tuned = make.save_expert(foreign, folder / "tuned-foreign")
    make.compress_tiny(foreign, tuned, folder / "foreign", text)
    (folder / "shell" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "drop").mkdir()
    experts = [{"name": name, "path": name} for name in (*NAMES, "broken")]
    experts.append({"name": "far", "path": "nobody/here@main"})
    # A duration that no test waits for, so that nothing leaves by itself; and room for experts that come later.
    kept = {"experts_dir": "drop", "state": "state.json", "ttl": "1d", "slot": {"bytes": "64KiB"}}
    return make.write_config(folder, {"enable_prefix_caching": True}, experts=experts, **kept)


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: SimpleNamespace, text_file: Path
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    config = build_site(folder, checkpoints, text_file)
    command = [*deltamux_serve(config), "--api-key", KEY]
    with running_server(command, folder / "server.log", checkpoints.environment) as server:
        site = Site(folder, server, checkpoints.scraped)
        with site.client:
            yield site


def test_models_lists_base_auto_and_the_experts_that_loaded(site: Site) -> None:
    listed = {model["id"]: model for model in site.http("GET", "/v1/models").json()["data"]}
    assert set(listed) == {"tiny", "auto", *NAMES}
    assert listed["math"]["parent"] == "tiny"
    assert listed["math"]["root"] == str(site.folder / "math")


@pytest.mark.parametrize("name", [*NAMES, "tiny"])
def test_a_named_model_answers_under_its_name(site: Site, name: str) -> None:
    raw = site.client.chat.completions.with_raw_response.create(
        model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert raw.parse().model == name
    assert raw.headers["x-deltamux-expert"] == ("base" if name == "tiny" else name)
    assert raw.headers["x-deltamux-reason"] == "explicit"


def test_experts_and_base_answer_differently(site: Site) -> None:
    # Random weights may end a turn at once, and two empty answers are alike.
    whole = {"extra_body": {"ignore_eos": True}, "max_tokens": 16}
    assert len({site.text(name, **whole) for name in (*NAMES, "tiny")}) == len(NAMES) + 1


@pytest.mark.parametrize("domain", [*NAMES, "general"])
def test_auto_goes_where_the_domain_points(
    site: Site, checkpoints: SimpleNamespace, domain: str
) -> None:
    words = checkpoints.words[domain].split()
    raw = site.client.chat.completions.with_raw_response.create(
        model="auto",
        messages=[{"role": "user", "content": f"{words[0]} the {words[4]} of {words[2]}"}],
        max_tokens=4,
    )
    general = domain == "general"
    assert raw.parse().model == ("tiny" if general else domain)
    assert raw.headers["x-deltamux-domain"] == domain
    assert raw.headers["x-deltamux-reason"] == ("abstain" if general else "router")
    assert 0 < float(raw.headers["x-deltamux-confidence"]) <= 1


def test_route_decides_without_generating(site: Site) -> None:
    body = {"messages": [{"role": "user", "content": "select the column where rows join"}]}
    decision = site.http("POST", "/v1/route", json=body).json()
    assert (decision["expert"], decision["reason"]) == ("sql", "router")
    assert sum(decision["probabilities"].values()) == pytest.approx(1)


def test_route_explains_when_asked(site: Site) -> None:
    body = {"prompt": "select the column where rows join", "explain": True}
    found = site.http("POST", "/v1/route", json=body).json()["explanation"]
    assert found["domain"] == "sql"
    assert found["tokens"][0]["lead"] != 0
    assert set(found["thresholds"]) == set(NAMES)


def test_the_router_is_reloaded_whole_or_not_at_all(site: Site) -> None:
    def reload(path: Path) -> httpx.Response:
        return site.http("POST", "/v1/router/reload", json={"path": str(path)})

    bad = reload(site.folder / "sql")
    assert bad.status_code == 400
    assert "router_config.json" in bad.json()["error"]["message"]
    assert site.ask("auto", "select the column of rows").model == "sql"
    good = reload(site.folder / "router")
    assert good.status_code == 200
    assert site.ask("auto", "select the column of rows").model == "sql"
    assert site.metrics()["deltamux_router_reloads_total", "result=refused"] >= 1
    assert site.http("GET", "/v1/router").json()["drift"]["decisions"] >= 1


@pytest.mark.parametrize("model", ["math", "tiny"])
def test_streaming_gives_the_same_text(site: Site, model: str) -> None:
    parts = [
        choice.delta.content or ""
        for chunk in site.ask(model, stream=True)
        for choice in chunk.choices
    ]
    assert "".join(parts) == site.text(model)


def test_completions_responses_and_messages_answer_from_the_expert(site: Site) -> None:
    completion = site.client.completions.create(model="math", prompt="abc", max_tokens=3)
    response = site.client.responses.create(model="sql", input="abc", max_output_tokens=3)
    body = {"model": "shell", "max_tokens": 3, "messages": [{"role": "user", "content": "abc"}]}
    message = site.http("POST", "/v1/messages", json=body).json()
    assert (completion.model, response.model, message["model"]) == NAMES


def test_auto_works_for_completions_by_text_and_by_token_ids(site: Site) -> None:
    text = "select the table where rows join"
    ids = site.http("POST", "/tokenize", json={"model": "tiny", "prompt": text}).json()["tokens"]
    for prompt in (text, ids):
        completion = site.client.completions.create(model="auto", prompt=prompt, max_tokens=3)
        assert completion.model == "sql"


def test_a_batch_of_conversations_answers_from_the_expert(site: Site) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("abc", "xyz")]
    body = {"model": "shell", "messages": conversations, "max_tokens": 8, "temperature": 0}
    answer = site.http("POST", "/v1/chat/completions/batch", json=body)
    assert answer.headers["x-deltamux-expert"] == "shell"
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts == [site.text("shell", "abc"), site.text("shell", "xyz")]


def test_structured_output_holds_for_an_expert(site: Site) -> None:
    answer = site.text(
        "math", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, max_tokens=5
    )
    assert answer in ("yes", "no")


def test_an_unknown_model_gets_vllms_404(site: Site) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        site.ask("nobody")
    assert caught.value.body["type"] == "NotFoundError"
    assert "nobody" in caught.value.body["message"]


def test_an_experts_own_chat_template_is_used(site: Site) -> None:
    ours, bases = site.ask("shell", "abc").usage, site.ask("tiny", "abc").usage
    # <|system|>, 16 characters, <|end|>, 3 characters; against <|user|> abc <|end|> <|assistant|>.
    assert (ours.prompt_tokens, bases.prompt_tokens) == (21, 6)


def test_an_experts_own_stop_token_ends_its_answers(site: Site) -> None:
    full = site.ask("math", logprobs=True).choices[0]
    ids = site.client.completions.create(
        model="math",
        prompt="xyz",
        max_tokens=6,
        temperature=0,
        logprobs=0,
        extra_body={"return_tokens_as_token_ids": True},
    )
    tokens = [int(token.removeprefix("token_id:")) for token in ids.choices[0].logprobs.tokens]
    assert full.finish_reason == "length"
    copy = site.folder / "stopping"
    shutil.copytree(site.folder / "math", copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, tokens[2]]}))
    created = site.http("POST", "/v1/experts", json={"name": "stopping", "path": str(copy)})
    assert created.status_code == 201, created.text
    stopped = site.client.completions.create(
        model="stopping", prompt="xyz", max_tokens=6, temperature=0
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == tokens.index(tokens[2]) + 1
    assert site.http("DELETE", "/v1/experts/stopping").json()["deleted"]


def test_a_corrupt_expert_is_refused_with_its_reason_while_others_serve(site: Site) -> None:
    listed = {each["id"]: each for each in site.http("GET", "/v1/experts").json()["data"]}
    assert "truncated" in listed["broken"]["error"]
    with pytest.raises(openai.InternalServerError) as caught:
        site.ask("broken")
    assert caught.value.status_code == 503
    assert "truncated" in caught.value.body["message"]
    assert site.ask("math").model == "math"


def test_an_expert_that_the_hub_does_not_give_is_refused_in_one_line(site: Site) -> None:
    error = site.http("GET", "/v1/experts/far").json()["error"]
    assert error.startswith("'nobody/here@main' is no directory here, and the hub does not give it")
    assert "\n" not in error
    with pytest.raises(openai.InternalServerError) as caught:
        site.ask("far")
    assert caught.value.status_code == 503


def test_an_expert_in_the_watched_folder_comes_and_goes(
    site: Site, eventually: Callable[[Callable[[], Any]], Any]
) -> None:
    shutil.copytree(site.folder / "other", site.folder / "drop" / "dropped")
    path = "/v1/experts/dropped"
    eventually(lambda: site.http("GET", path).status_code == 200)
    answer = site.text("dropped")
    body = {"name": "other", "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    assert answer == site.text("other")
    assert site.http("DELETE", "/v1/experts/other").json()["deleted"]
    shutil.rmtree(site.folder / "drop" / "dropped")
    eventually(lambda: site.http("GET", path).status_code == 404)


def test_no_step_waits_for_an_expert_that_is_brought_in(site: Site) -> None:
    before = site.metrics()
    stream = site.ask("math", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    first = next(stream)
    for name in ("sql", "shell", "sql", "shell"):
        site.ask(name, max_tokens=1)
    assert len([first, *stream]) > 1
    after = site.metrics()
    moved = {
        name: after["deltamux_swaps_total", f"expert={name}", "tier=slot"]
        - before["deltamux_swaps_total", f"expert={name}", "tier=slot"]
        for name in ("sql", "shell")
    }
    assert min(moved.values()) >= 1
    assert after["deltamux_step_stalls_total",] == before["deltamux_step_stalls_total",]


def test_routers_read_residency_under_vllms_names(site: Site) -> None:
    stream = site.ask("math", max_tokens=100, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    next(stream)
    found = site.metrics()
    list(stream)
    labels = {label for key in found if key[0] == "vllm:lora_requests_info" for label in key[1:]}
    assert "running_lora_adapters=math" in labels
    assert not any("@" in label for label in labels)
    loaded = {key[1:] for key in found if key[0] == "vllm:lora_adapter_loaded"}
    assert ("adapter_name=math", "engine=0", "level=gpu", "pinned=false") in loaded
    assert found["vllm:num_gpu_loaded_lora_adapters", "engine=0"] == sum(
        "level=gpu" in labels for labels in loaded
    )


def test_a_foreign_expert_is_refused_naming_its_base(site: Site) -> None:
    body = {"name": "foreign", "path": str(site.folder / "foreign")}
    refused = site.http("POST", "/v1/experts", json=body)
    assert refused.status_code == 400
    assert "foreign-base" in refused.json()["error"]["message"]
    assert site.http("GET", "/v1/experts/foreign").status_code == 404


@pytest.mark.parametrize("name", ["auto", "base", "tiny", "a/b", ""])
def test_a_name_that_is_taken_or_malformed_is_refused(site: Site, name: str) -> None:
    body = {"name": name, "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=body).status_code in (400, 422)


def test_an_updated_expert_is_never_served_from_the_old_ones_cache(site: Site) -> None:
    long = "the same long prompt fills whole blocks of the prefix cache. " * 6
    moving = site.folder / "moving"
    shutil.copytree(site.folder / "math", moving)
    body = {"name": "moving", "path": str(moving)}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    before = site.text("moving", long)
    assert before == site.text("math", long)
    shutil.rmtree(moving)
    shutil.copytree(site.folder / "other", moving)
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    other = {"name": "other", "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=other).status_code == 201
    after = site.text("moving", long)
    assert after == site.text("other", long)
    assert after != before
    for name in ("moving", "other"):
        assert site.http("DELETE", f"/v1/experts/{name}").json()["deleted"]


def test_more_experts_than_slots_answer_at_once_as_they_do_alone(site: Site) -> None:
    asks = [(name, f"question {i}") for i in range(4) for name in (*NAMES, "tiny")]
    alone = [site.text(*ask) for ask in asks]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{site.server.url}/v1", api_key=KEY, max_retries=0
        ) as client:

            async def one(model: str, text: str) -> str:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": text}],
                    max_tokens=8,
                    temperature=0,
                )
                return answer.choices[0].message.content or ""

            return await asyncio.gather(*(one(*ask) for ask in asks))

    assert asyncio.run(together()) == alone


def test_load_pin_and_delete_while_a_request_runs(site: Site) -> None:
    expected = site.text("sql", "go on", max_tokens=200, extra_body={"ignore_eos": True})
    body = {"name": "guest", "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    guest = site.text("guest", "go on", max_tokens=200, extra_body={"ignore_eos": True})
    streams = [
        site.ask(name, "go on", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
        for name in ("guest", "sql")
    ]
    firsts = [next(stream) for stream in streams]
    assert site.http("POST", "/v1/experts/sql/pin").json()["pinned"]
    refused = site.http("POST", "/v1/experts/math/pin")
    assert refused.status_code == 400
    assert "one must stay free" in refused.json()["error"]["message"]
    texts = []
    for first, stream in zip(firsts, streams, strict=True):
        chunks = [first, *stream]
        texts.append("".join(c.delta.content or "" for k in chunks for c in k.choices))
    assert texts == [guest, expected]
    assert site.http("DELETE", "/v1/experts/guest").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        site.ask("guest")
    for name in NAMES:
        site.ask(name)
    assert site.http("GET", "/v1/experts/sql").json()["tier"] == "slot"


def test_a_batch_that_needs_every_slot_is_served_in_spite_of_pins(site: Site) -> None:
    assert site.http("POST", "/v1/experts/sql/pin").json()["pinned"]
    asks = [(name, f"go on {i}") for i in range(3) for name in ("math", "shell")]
    alone = [site.text(*ask, max_tokens=40) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: site.text(*ask, max_tokens=40), asks))
    assert together == alone
    assert site.ask("sql").model == "sql"
    assert site.http("GET", "/v1/experts/sql").json()["tier"] == "slot"


def test_an_expert_that_leaves_the_disk_stays_served_and_a_bad_update_changes_nothing(
    site: Site,
) -> None:
    fading = site.folder / "fading"
    shutil.copytree(site.folder / "other", fading)
    body = {"name": "fading", "path": str(fading)}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    before = site.text("fading")
    weights = fading / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    refused = site.http("POST", "/v1/experts", json=body)
    assert refused.status_code == 400
    assert "truncated" in refused.json()["error"]["message"]
    assert site.text("fading") == before
    assert site.http("DELETE", "/v1/experts/fading").json()["deleted"]


def test_an_expert_that_returns_while_its_old_version_still_answers_serves_both(
    site: Site,
) -> None:
    body = {"name": "again", "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    arguments: dict[str, Any] = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    expected = site.text("again", "go on", **arguments)
    stream = site.ask("again", "go on", stream=True, **arguments)
    first = next(stream)
    with ThreadPoolExecutor(1) as pool:
        deletion = pool.submit(site.http, "DELETE", "/v1/experts/again")
        while site.http("GET", "/v1/experts/again").status_code != 404:
            pass
        assert site.http("POST", "/v1/experts", json=body).status_code == 201
        assert site.text("again", "go on", **arguments) == expected
        chunks = [first, *stream]
        assert "".join(c.delta.content or "" for k in chunks for c in k.choices) == expected
        assert deletion.result().json()["deleted"]
    assert site.text("again", "go on", **arguments) == expected
    assert site.http("DELETE", "/v1/experts/again").json()["deleted"]


def test_a_pin_passes_on_to_the_next_version(site: Site) -> None:
    # Two slots allow one pin, and a new start is the way to lose one.
    site.http("DELETE", "/v1/experts/sql")
    again = {"name": "sql", "path": str(site.folder / "sql")}
    assert site.http("POST", "/v1/experts", json=again).status_code == 201
    kept = site.folder / "kept"
    shutil.copytree(site.folder / "math", kept)
    body = {"name": "kept", "path": str(kept)}
    assert site.http("POST", "/v1/experts", json=body | {"pin": True}).status_code == 201
    shutil.rmtree(kept)
    shutil.copytree(site.folder / "other", kept)
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    for _ in range(50):
        described = site.http("GET", "/v1/experts/kept").json()
        if described["pinned"]:
            break
    assert described["pinned"]
    assert described["tier"] == "slot"
    assert site.http("DELETE", "/v1/experts/kept").json()["deleted"]


def test_a_template_that_changes_beside_the_same_weights_is_taken_over(site: Site) -> None:
    talking = site.folder / "talking"
    shutil.copytree(site.folder / "math", talking)
    body = {"name": "talking", "path": str(talking)}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    before = site.ask("talking", "abc").usage.prompt_tokens
    (talking / "chat_template.jinja").write_text(TEMPLATE)
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    assert (before, site.ask("talking", "abc").usage.prompt_tokens) == (6, 21)
    assert site.http("DELETE", "/v1/experts/talking").json()["deleted"]


def test_delete_waits_for_the_requests_that_run(site: Site) -> None:
    body = {"name": "leaving", "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    arguments: dict[str, Any] = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    expected = site.text("leaving", "go on", **arguments)

    async def scene() -> tuple[str, bool]:
        async with openai.AsyncOpenAI(base_url=f"{site.server.url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(
                model="leaving",
                messages=[{"role": "user", "content": "go on"}],
                temperature=0,
                stream=True,
                **arguments,
            )
            first = await anext(stream)
            deletion = asyncio.create_task(
                asyncio.to_thread(site.http, "DELETE", "/v1/experts/leaving")
            )
            chunks = [first, *[chunk async for chunk in stream]]
            deleted = (await deletion).json()["deleted"]
            text = "".join(c.delta.content or "" for k in chunks for c in k.choices)
            return text, deleted

    assert asyncio.run(scene()) == (expected, True)


def test_an_unknown_expert_is_missing_everywhere(site: Site) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/pin")):
        answer = site.http(method, f"/v1/experts/nobody{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"


def test_the_api_key_guards_our_routes(site: Site) -> None:
    for method, path in (
        ("GET", "/v1/experts"),
        ("POST", "/v1/route"),
        ("POST", "/v1/experts"),
        ("POST", "/v1/router/reload"),
    ):
        assert httpx.request(method, f"{site.server.url}{path}", json={}).status_code == 401


def test_metrics_count_what_clients_sent(site: Site) -> None:
    before = site.metrics()
    answers = [site.ask("math"), site.ask("math"), site.ask("auto", "select the column of rows")]
    after = site.metrics()

    def grown(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    assert grown("deltamux_requests_total", "expert=math", "reason=explicit") == 2
    assert grown("deltamux_requests_total", "expert=sql", "reason=router") == 1
    assert grown("deltamux_ttft_seconds_count", "expert=math") == 2
    assert grown("deltamux_e2e_seconds_count", "expert=math") == 2
    tokens = sum(answer.usage.completion_tokens for answer in answers[:2])
    assert grown("deltamux_tokens_total", "expert=math", "kind=generated") == tokens
    assert grown("deltamux_itl_seconds_count", "expert=math") == tokens - 2
    assert grown("deltamux_router_decisions_total", "domain=sql", "reason=router") == 1
    assert grown("deltamux_router_seconds_count") == 1


def test_every_metric_of_the_contract_is_exported(site: Site) -> None:
    site.ask("auto")
    names = {key[0] for key in site.metrics()}
    assert names >= {
        "deltamux_requests_total",
        "deltamux_ttft_seconds_bucket",
        "deltamux_itl_seconds_bucket",
        "deltamux_e2e_seconds_bucket",
        "deltamux_router_decisions_total",
        "deltamux_router_seconds_bucket",
        "deltamux_router_confidence_bucket",
        "deltamux_router_domain_ratio",
        "deltamux_router_fit_domain_ratio",
        "deltamux_router_abstention_ratio",
        "deltamux_router_mean_confidence",
        "deltamux_router_token_source_total",
        "deltamux_swaps_total",
        "deltamux_swap_seconds_bucket",
        "deltamux_expert_resident",
        "deltamux_expert_bytes",
        "deltamux_memory_bytes",
        "deltamux_evictions_total",
        "deltamux_step_stalls_total",
        "deltamux_build_info",
    }
    kinds = {key[1] for key in site.metrics() if key[0] == "deltamux_memory_bytes"}
    assert kinds == {f"kind={k}" for k in ("base", "slots", "host_cache", "kv_cache", "process")}
    assert any(name.startswith("vllm:") for name in names)


def test_the_memory_of_the_base_is_that_of_its_weights(site: Site) -> None:
    from safetensors import safe_open

    with safe_open(site.folder / "base" / "model.safetensors", framework="pt") as file:
        weights = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    expected = sum(weight.numel() * weight.element_size() for weight in weights)
    # vLLM pads the 272 rows of embedding and lm_head to a multiple of 64.
    padding = 2 * 48 * 64 * 4
    assert site.metrics()["deltamux_memory_bytes", "kind=base"] == expected + padding


def test_vllms_own_command_serves_experts_too(site: Site, checkpoints: SimpleNamespace) -> None:
    # An expert that was added to the other server, which keeps it for the next start.
    body = {"name": "added", "path": str(site.folder / "other")}
    assert site.http("POST", "/v1/experts", json=body).status_code == 201
    # The worker does not see --lora-modules: their slots' size is named.
    additional = {
        "deltamux": {
            "version": 1,
            "experts": [{"name": "sql", "path": f"{site.folder}/sql"}],
            "slot": {"bytes": "1MB"},
            "state": f"{site.folder}/state.json",
        }
    }
    command = [
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server", "--model", f"{site.folder}/base"),
        *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "4"),
        *("--enable-lora", "--max-loras", "2", "--lora-modules", f"math={site.folder}/math"),
        *("--additional-config", json.dumps(additional), "--api-key", KEY),
    ]
    environment = checkpoints.environment | {"VLLM_PLUGINS": "deltamux"}
    with running_server(command, site.folder / "plain.log", environment) as server:
        plain = Site(site.folder, server, site.scraped)
        with plain.client:
            for name in ("math", "sql", "added", "tiny"):
                assert plain.ask(name).model == name
                assert plain.text(name) == site.text(name)
            assert plain.ask("auto").model == "tiny"
        listed = plain.http("GET", "/v1/experts").json()["data"]
        assert {each["id"] for each in listed} == {"math", "sql", "added"}
