"""A server with tenants, whose configuration names damaged experts too: nobody gets in, nothing spreads."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from safetensors.torch import load_file, save_file

from deltamux.compression.artifact.manifest import manifest_sha256
from deltamux.compression.files import sha256
from deltamux.serve.api.tenants import make_key
from deltamux.serve.demo.server import Server, deltamux_serve, running_server

pytestmark = pytest.mark.vllm

API_KEY = "vllm-own-key"
NAMES = ("math", "sql", "shell")
TENANTS: dict[str, dict[str, Any]] = {
    "team": {"experts": ["math", "sql"]},
    "boss": {"admin": True},
    "two-a-minute": {"requests_per_minute": 2},
    "few-tokens": {"tokens_per_minute": 12},
    "one-at-a-time": {"concurrency": 1},
}
# What may be wrong beside the weights of an expert that the configuration names, and the file that the refusal names.
DAMAGED = {
    "bad-list": ("generation_config.json", "[]"),
    "bad-null": ("generation_config.json", "null"),
    "bad-end": ("generation_config.json", '{"eos_token_id": [132.5]}'),
    "bad-token": ("generation_config.json", '{"eos_token_id": 1000000}'),
    "bad-text": ("generation_config.json", '{"temperature": "0.7"}'),
    "bad-config": ("config.json", "{"),
    "bad-tokenizer": ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}'),
    "bad-template": ("chat_template.jinja", "{% for m in messages %}"),
}


@dataclass(frozen=True)
class Fortress:
    """A running server, its folder, and a key for each tenant."""

    folder: Path
    server: Server
    keys: dict[str, str]
    scraped: Callable[[str], dict[tuple[str, ...], float]]

    def http(self, method: str, path: str, who: str = "boss", **arguments: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}"} | arguments.pop("headers", {})
        url = f"{self.server.url}{path}"
        return httpx.request(method, url, headers=headers, timeout=300, **arguments)

    def complete(self, model: str, who: str = "boss", **body: Any) -> httpx.Response:
        asked = {"prompt": "add 3", "max_tokens": 6, "temperature": 0, "model": model} | body
        return self.http("POST", "/v1/completions", who, json=asked)

    def text(self, model: str, **body: Any) -> str:
        answer = self.complete(model, **body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def load(self, name: str, path: Path | str, **body: Any) -> httpx.Response:
        return self.http("POST", "/v1/experts", json={"name": name, "path": str(path), **body})

    def copied(self, name: str, source: str = "math") -> Path:
        return shutil.copytree(self.folder / source, self.folder / name)

    def metrics(self) -> dict[tuple[str, ...], float]:
        return self.scraped(self.http("GET", "/metrics").text)


def reseal(folder: Path) -> None:
    """Put the hashes that content has now into an artifact's manifest."""
    path = folder / "delta_config.json"
    content = json.loads(path.read_text())
    content["weights_sha256"] = sha256(folder / "model.safetensors")
    content["totals"]["weights_file_bytes"] = (folder / "model.safetensors").stat().st_size
    path.write_text(json.dumps(content | {"sha256": manifest_sha256(content)}))


@pytest.fixture(scope="module")
def fortress(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: SimpleNamespace, text_file: Path
) -> Iterator[Fortress]:
    folder = tmp_path_factory.mktemp("fortress")
    checkpoints.write_parts(folder, text_file, NAMES)
    for name, (file, content) in DAMAGED.items():
        shutil.copytree(folder / "math", folder / name)
        (folder / name / "chat_template.jinja").unlink(missing_ok=True)
        (folder / name / file).write_text(content)
    made = {name: make_key() for name in TENANTS}
    tenants = [{"name": n, "keys": [made[n][1]], **TENANTS[n]} for n in TENANTS]
    (folder / "tenants.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    config = checkpoints.write_config(
        folder,
        {"enable_prefix_caching": True, "enable_scale_out": True},
        experts=[{"name": name, "path": name} for name in (*NAMES, *DAMAGED)],
        tenants="tenants.yaml",
    )
    command = [*deltamux_serve(config), "--api-key", API_KEY, "--allowed-origins", '["*"]']
    keys = {name: key for name, (key, _) in made.items()} | {"api-key": API_KEY}
    environment = checkpoints.environment | {"PROMETHEUS_MULTIPROC_DIR": str(folder / "multi")}
    with running_server(command, folder / "server.log", environment) as server:
        yield Fortress(folder, server, keys, checkpoints.scraped)


# What is read beside the weights.


@pytest.mark.parametrize("name", DAMAGED)
def test_a_configured_expert_is_refused_by_file_while_the_others_serve(
    fortress: Fortress, name: str
) -> None:
    found = fortress.http("GET", f"/v1/experts/{name}").json()
    assert DAMAGED[name][0] in found["error"]
    assert fortress.complete(name).status_code == 503
    assert fortress.complete("math").status_code == 200


@pytest.mark.parametrize("name", DAMAGED)
def test_a_client_s_expert_is_refused_by_file(fortress: Fortress, name: str) -> None:
    answer = fortress.load("newcomer", fortress.folder / name)
    assert answer.status_code == 400
    assert DAMAGED[name][0] in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 20.0}, {"eos_token_id": [132.0]}, {"max_new_tokens": 1e9}]
)
def test_a_whole_number_with_a_point_serves_and_harms_nobody(
    fortress: Fortress, settings: dict[str, Any]
) -> None:
    folder = fortress.copied("pointed")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert fortress.load("pointed", folder).status_code == 201
    asked = {"model": "pointed", "messages": [{"role": "user", "content": "x"}]}
    assert fortress.http("POST", "/v1/chat/completions", json=asked).status_code == 200
    assert fortress.complete("tiny").status_code == 200
    fortress.http("DELETE", "/v1/experts/pointed")
    shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_an_answer_ends_at_what_any_of_the_three_files_names(fortress: Fortress, file: str) -> None:
    asked = {
        "max_tokens": 12,
        "ignore_eos": True,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
    }
    whole = fortress.complete("math", **asked).json()["choices"][0]
    ids = [int(each.removeprefix("token_id:")) for each in whole["logprobs"]["tokens"]]
    third = next(each for each in ids[2:] if each not in ids[:2])
    folder = fortress.copied("ending")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "generation_config.json").unlink(missing_ok=True)
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    key, value = "eos_token_id", third
    if file == "tokenizer_config.json":
        (value,) = (token for token, each in vocabulary.items() if each == third)
        key = "eos_token"
    (folder / file).write_text(json.dumps(content | {key: value}))
    assert fortress.load("ending", folder).status_code == 201
    choice = fortress.complete("ending", max_tokens=12).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["text"]) < len(whole["text"])
    fortress.http("DELETE", "/v1/experts/ending")
    shutil.rmtree(folder)


# What is no artifact.


def test_a_pipe_in_place_of_the_weights_is_refused_and_freezes_nothing(fortress: Fortress) -> None:
    folder = fortress.copied("piped")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    answer = fortress.load("piped", folder)
    assert answer.status_code == 400
    assert "is no regular file" in answer.json()["error"]["message"]
    assert fortress.http("GET", "/health").status_code == 200


def test_steps_that_are_not_finite_never_reach_a_slot(fortress: Fortress) -> None:
    folder = fortress.copied("endless")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(".steps"):
            tensor.fill_(float("nan"))
    metadata = {"format": "deltamux", "format_version": "1"}
    save_file(weights, folder / "model.safetensors", metadata)
    reseal(folder)
    before = {model: fortress.text(model) for model in ("tiny", *NAMES)}
    answer = fortress.load("endless", folder)
    assert answer.status_code == 400
    assert "holds NaN or infinity" in answer.json()["error"]["message"]
    assert {model: fortress.text(model) for model in ("tiny", *NAMES)} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["tensors"].pop(1),
        lambda content: content["tensors"][0].update(scheme="quinary"),
        lambda content: content["base"].update(sha256={}),
        lambda content: content["base"]["sha256"].popitem(),
    ],
    ids=["an entry", "a scheme", "the base's hashes", "one of them"],
)
def test_a_manifest_that_does_not_fit_is_refused_even_if_it_is_sealed(
    fortress: Fortress, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = fortress.copied("resealed")
    path = folder / "delta_config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content | {"sha256": manifest_sha256(content)}))
    assert fortress.load("resealed", folder).status_code == 400
    shutil.rmtree(folder)


# Paths.


@pytest.mark.parametrize("path", ["/etc", "/proc/self", "/dev", "math", "", "~/experts", "/"])
def test_only_what_lies_under_the_roots_is_opened(fortress: Fortress, path: str) -> None:
    answer = fortress.load("intruder", path)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "none of the folders" in message or "absolute path" in message
    reload = fortress.http("POST", "/v1/router/reload", json={"path": path})
    assert reload.status_code == 400


def test_neither_a_link_nor_dots_lead_out_of_the_roots(fortress: Fortress, tmp_path: Path) -> None:
    outside = shutil.copytree(fortress.folder / "math", tmp_path / "outside")
    (fortress.folder / "link").symlink_to(outside)
    inner = fortress.copied("inner")
    (inner / "chat_template.jinja").unlink(missing_ok=True)
    (inner / "chat_template.jinja").symlink_to("/etc/hostname")
    dotted = f"{fortress.folder}/../{tmp_path.name}/outside"
    for path in (fortress.folder / "link", inner, dotted):
        answer = fortress.load("intruder", path)
        assert answer.status_code == 400
        assert "none of the folders" in answer.json()["error"]["message"]


def test_a_link_within_the_roots_is_followed(fortress: Fortress) -> None:
    (fortress.folder / "current").symlink_to("sql")
    assert fortress.load("current", fortress.folder / "current").status_code == 201
    assert fortress.text("current") == fortress.text("sql")
    assert fortress.http("DELETE", "/v1/experts/current").status_code == 200


# Routes.


def test_sagemaker_s_route_answers_with_the_model_of_the_body(fortress: Fortress) -> None:
    def invoke(body: dict[str, Any], **headers: str) -> httpx.Response:
        asked = {"max_tokens": 6, "temperature": 0} | body
        return fortress.http("POST", "/invocations", json=asked, headers=headers)

    found = invoke({"model": "math", "prompt": "add 3"})
    assert found.json()["model"] == "math"
    assert found.headers["x-deltamux-expert"] == "math"
    assert found.json()["choices"][0]["text"] == fortress.text("math")
    assert invoke({"model": "nosuch", "prompt": "x"}).status_code == 404
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "sql"}
    assert invoke({"model": "math", "prompt": "x"}, **header).json()["model"] == "sql"
    chat = [{"role": "user", "content": "select the column of rows"}]
    assert invoke({"model": "auto", "messages": chat}).json()["model"] == "sql"
    assert invoke({"input": "x"}).status_code == 400


def test_scoring_goes_through_the_gateway(fortress: Fortress) -> None:
    body = {"query": "a", "items": ["b", "c"], "label_token_ids": [65, 66]}

    def score(model: str) -> httpx.Response:
        return fortress.http("POST", "/generative_scoring", json=body | {"model": model})

    before = fortress.metrics().get(("deltamux_requests_total", "expert=math", "reason=explicit"))
    found = score("math")
    assert found.headers["x-deltamux-expert"] == "math"
    assert found.json()["model"] == "math"
    assert score("base").json()["model"] == score("tiny").json()["model"] == "tiny"
    assert score("auto").status_code == 200
    assert score("nosuch").status_code == 404
    after = fortress.metrics()["deltamux_requests_total", "expert=math", "reason=explicit"]
    assert after == (before or 0) + 1


def test_tokens_in_and_out_go_through_the_gateway(fortress: Fortress) -> None:
    def generate(model: str, who: str = "boss") -> httpx.Response:
        body = {
            "model": model,
            "token_ids": [65, 66, 67],
            "sampling_params": {"max_tokens": 4, "temperature": 0},
        }
        return fortress.http("POST", "/inference/v1/generate", who, json=body)

    found = generate("math")
    assert found.status_code == 200
    assert found.headers["x-deltamux-expert"] == "math"
    assert generate("nosuch").status_code == 404
    assert generate("shell", "team").status_code == 403


def test_rendering_and_counting_read_as_the_expert_does(fortress: Fortress) -> None:
    folder = fortress.copied("wordy")
    (folder / "chat_template.jinja").write_text("{{ 'word ' * 9 }}{{ messages[0]['content'] }}")
    assert fortress.load("wordy", folder).status_code == 201
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

    def tokens(path: str, model: str) -> int:
        found = fortress.http("POST", path, json=chat | {"model": model}).json()
        ids = found.get("tokens") or found.get("token_ids")
        return len(ids) if ids else found["input_tokens"]

    for path in ("/tokenize", "/v1/messages/count_tokens", "/v1/chat/completions/render"):
        assert tokens(path, "wordy") == 46
        assert tokens(path, "tiny") < 46
    assert (
        fortress.http("POST", "/tokenize", "team", json=chat | {"model": "wordy"}).status_code
        == 403
    )
    fortress.http("DELETE", "/v1/experts/wordy")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}),
        ("/v1/unload_lora_adapter", {"lora_name": "math"}),
        ("/adapters", {"name": "x", "src": "/etc"}),
    ],
)
def test_vllm_s_own_ways_to_load_adapters_are_closed(
    fortress: Fortress, path: str, body: dict[str, str]
) -> None:
    assert fortress.http("POST", path, json=body).status_code == 403


def test_beam_search_is_refused_where_an_expert_ends_otherwise(fortress: Fortress) -> None:
    folder = fortress.copied("beams")
    (folder / "generation_config.json").write_text('{"eos_token_id": 132}')
    assert fortress.load("beams", folder).status_code == 201
    beam = {"use_beam_search": True, "n": 2, "max_tokens": 5}
    answer = fortress.complete("beams", **beam)
    assert answer.status_code == 400
    assert "use_beam_search" in answer.json()["error"]["message"]
    key = ("deltamux_tokens_total", "expert=math", "kind=prompt")
    before = fortress.metrics().get(key, 0.0)
    found = fortress.complete("math", **beam, prompt="abc")
    assert found.json()["usage"]["prompt_tokens"] == fortress.metrics()[key] - before == 3
    fortress.http("DELETE", "/v1/experts/beams")


# Tenants.


def test_a_tenant_sees_and_reaches_its_experts_only(fortress: Fortress) -> None:
    listed = fortress.http("GET", "/v1/models", "team").json()["data"]
    assert {each["id"] for each in listed} == {"tiny", "auto", "math", "sql"}
    assert str(fortress.folder) not in json.dumps(listed)
    shown = fortress.http("GET", "/v1/experts", "team").json()["data"]
    assert {each["id"] for each in shown} == {"math", "sql"}
    assert {each["path"] for each in shown} == {None}
    assert fortress.http("GET", "/v1/experts/shell", "team").status_code == 404
    assert fortress.complete("math", "team").status_code == 200
    assert fortress.complete("tiny", "team").status_code == 200
    refused = fortress.complete("shell", "team")
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "PermissionDeniedError"
    # What there is not looks the same.
    assert fortress.complete("nosuch", "team").status_code == 403


def test_auto_chooses_among_what_a_tenant_may_use(fortress: Fortress) -> None:
    def ask(who: str) -> str:
        body = {"model": "auto", "messages": [{"role": "user", "content": SHELL}], "max_tokens": 2}
        model: str = fortress.http("POST", "/v1/chat/completions", who, json=body).json()["model"]
        return model

    assert ask("boss") == "shell"
    assert ask("team") != "shell"
    route = fortress.http("POST", "/v1/route", "team", json={"prompt": SHELL, "explain": True})
    assert "shell" not in route.text
    assert "shell" in fortress.http("POST", "/v1/route", json={"prompt": SHELL}).text


SHELL = "list the directory of grep folder"


def test_only_admins_change_what_is_served(fortress: Fortress) -> None:
    body = {"name": "math", "path": str(fortress.folder / "sql")}
    for method, path in (
        ("POST", "/v1/experts"),
        ("DELETE", "/v1/experts/math"),
        ("POST", "/v1/experts/math/pin"),
        ("POST", "/v1/router/reload"),
        ("POST", "/v1/tenants/reload"),
    ):
        assert fortress.http(method, path, "team", json=body).status_code == 403
    assert fortress.http("POST", "/v1/experts/math/pin", "api-key").status_code == 200


def test_more_requests_than_a_minute_allows_are_told_when_to_come_back(fortress: Fortress) -> None:
    statuses = [fortress.complete("math", "two-a-minute").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    answer = fortress.complete("math", "two-a-minute")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["type"] == "RateLimitError"
    assert fortress.http("GET", "/v1/models", "two-a-minute").status_code == 200


def test_tokens_are_charged_when_an_answer_has_ended(fortress: Fortress) -> None:
    whole = {"max_tokens": 40, "ignore_eos": True}
    assert fortress.complete("math", "few-tokens", **whole).status_code == 200
    answer = fortress.complete("math", "few-tokens", **whole)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 60
    found = fortress.metrics()
    assert found["deltamux_tenant_tokens_total", "kind=generated", "tenant=few-tokens"] == 40
    assert found["deltamux_tenant_refusals_total", "reason=tokens", "tenant=few-tokens"] == 1


def test_one_request_at_a_time_is_one(fortress: Fortress, eventually: Any) -> None:
    def status() -> int:
        return fortress.complete("math", "one-at-a-time").status_code

    # A request whose body never comes takes its tenant's place, and nobody else's.
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {fortress.keys['one-at-a-time']}"
    host, port = fortress.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}\r\nContent-Length: 9\r\n\r\n".encode())
        eventually(lambda: status() == 429)
        assert fortress.complete("math", "one-at-a-time").headers["retry-after"] == "1"
        assert fortress.complete("math").status_code == 200
    eventually(lambda: status() == 200)


def test_tenants_share_no_part_of_the_prefix_cache(fortress: Fortress) -> None:
    prompt = "the same long words of two tenants " * 8

    def cached(who: str) -> float:
        before = fortress.metrics()[HITS]
        assert fortress.complete("sql", who, prompt=prompt).status_code == 200
        return fortress.metrics()[HITS] - before

    cached("team")
    assert cached("team") > 0
    assert cached("boss") == 0
    cached("api-key")
    assert cached("api-key") > 0


HITS = ("vllm:prefix_cache_hits_total", "engine=0", "model_name=tiny")


def test_tenants_are_read_again_whole_or_not_at_all(fortress: Fortress) -> None:
    path = fortress.folder / "tenants.yaml"
    before = path.read_text()
    key, hashed = make_key()
    fortress.keys["newcomer"] = key
    assert fortress.http("GET", "/v1/models", "newcomer").status_code == 401
    path.write_text("tenants: nonsense")
    assert fortress.http("POST", "/v1/tenants/reload").status_code == 400
    assert fortress.http("GET", "/v1/models", "team").status_code == 200
    added = [*yaml.safe_load(before)["tenants"], {"name": "newcomer", "keys": [hashed]}]
    path.write_text(yaml.safe_dump({"tenants": added}))
    assert "newcomer" in fortress.http("POST", "/v1/tenants/reload").json()["data"]
    assert fortress.http("GET", "/v1/models", "newcomer").status_code == 200
    path.write_text(before)
    assert fortress.http("POST", "/v1/tenants/reload").status_code == 200
    assert fortress.http("GET", "/v1/models", "newcomer").status_code == 401


def test_readiness_is_open_and_its_reasons_are_not(fortress: Fortress) -> None:
    assert httpx.get(f"{fortress.server.url}/v1/ready").json().keys() == {"ready"}
    assert "reasons" in fortress.http("GET", "/v1/ready").json()
    assert "reasons" not in fortress.http("GET", "/v1/ready", "team").json()


def test_metrics_of_gauges_are_there_although_a_variable_asks_for_several_processes(
    fortress: Fortress,
) -> None:
    names = {name for name, *_ in fortress.metrics()}
    assert {"deltamux_expert_resident", "deltamux_memory_bytes"} <= names


# Faults.


def test_an_expert_whose_files_go_while_it_is_used_answers_as_before(fortress: Fortress) -> None:
    folder = fortress.copied("fading", "sql")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    assert fortress.load("fading", folder).status_code == 201
    expected = fortress.text("fading")
    assert expected == fortress.text("sql")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content in (whole[:-100], bytes(flipped), b""):
        weights.write_bytes(content)
        assert fortress.text("fading") == expected
        assert fortress.load("fading", folder).status_code == 400
        assert fortress.text("fading") == expected
    shutil.rmtree(folder)
    assert fortress.text("fading") == expected
    assert fortress.load("fading", folder).status_code == 400
    fortress.http("DELETE", "/v1/experts/fading")
    assert fortress.complete("fading").status_code == 404


def test_two_updates_of_one_name_end_with_one_of_them(fortress: Fortress) -> None:
    texts = {name: fortress.text(name) for name in ("math", "sql")}
    for _ in range(4):
        with ThreadPoolExecutor(4) as pool:
            folders = [fortress.folder / name for name in ("math", "sql", "math", "sql")]
            answers = list(pool.map(lambda path: fortress.load("raced", path), folders))
        assert {answer.status_code for answer in answers} == {201}
        path = fortress.http("GET", "/v1/experts/raced").json()["path"]
        assert fortress.text("raced") == texts[Path(path).name]
    assert fortress.http("DELETE", "/v1/experts/raced").status_code == 200


def test_hundreds_of_clients_that_leave_cost_no_answer(fortress: Fortress, eventually: Any) -> None:
    expected = {name: fortress.text(name) for name in ("tiny", *NAMES)}

    def leave(number: int) -> None:
        model = ("tiny", *NAMES)[number % 4]
        body = {"model": model, "prompt": "x", "max_tokens": 300, "ignore_eos": True}
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        content = json.dumps(body | {"stream": number % 3 > 0})
        head += f"Authorization: Bearer {fortress.keys['boss']}\r\nContent-Length: {len(content)}"
        host, port = fortress.server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(f"{head}\r\n\r\n{content}".encode())
            if number % 2:
                client.recv(64)
            # Half of them without a farewell.
            if number % 4 == 1:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(200)))
    running = ("vllm:num_requests_running", "engine=0", "model_name=tiny")
    eventually(lambda: fortress.metrics()[running] == 0)
    assert {name: fortress.text(name) for name in ("tiny", *NAMES)} == expected
    flight = {k: v for k, v in fortress.metrics().items() if k[0] == "deltamux_requests_in_flight"}
    assert not sum(flight.values())


def test_the_server_is_well_after_all_of_this(fortress: Fortress) -> None:
    assert fortress.http("GET", "/health").status_code == 200
    found = fortress.metrics()
    requests = sum(v for k, v in found.items() if k[0] == "deltamux_requests_total")
    outcomes = sum(v for k, v in found.items() if k[0] == "deltamux_request_outcomes_total")
    assert requests == outcomes
