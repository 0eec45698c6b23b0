"""Who may use which route: over every route that vLLM's sources have, registered here or not, and all of ours.

The application is vLLM's own, built with every optional part on and without an engine: a request that the guard lets
in fails behind it, with a status of its own.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from deltamux.serve.api import surface
from deltamux.serve.api.access import ROUTES, Access, access_of
from deltamux.serve.api.tenants import make_key

pytestmark = pytest.mark.vllm

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
API_KEY = "vllm-own-key"
# What the routes of vLLM that take a model's name call on app.state; a new one has to be put here and into `surface.py`.
MODEL_ROUTES = {
    "/v1/chat/completions": ("openai_serving_chat", "create_chat_completion"),
    "/v1/chat/completions/batch": ("openai_serving_chat_batch", "create_batch_chat_completion"),
    "/v1/completions": ("openai_serving_completion", "create_completion"),
    "/v1/responses": ("openai_serving_responses", "create_responses"),
    "/v1/messages": ("anthropic_serving_messages", "create_messages"),
    "/v1/messages/count_tokens": ("anthropic_serving_messages", "count_tokens"),
    "/cohere/v2/chat": ("cohere_serving_chat_v2", "create_chat_v2"),
    "/cohere/v2/chat/render": ("serving_render", "render_chat_request"),
    "/generative_scoring": ("serving_generative_scoring", "create_generative_scoring"),
    "/inference/v1/generate": ("serving_tokens", "serve_tokens"),
    "/v1/systemone": ("serving_structured_decisions", "create_decision"),
    "/tokenize": ("serving_tokenization", "create_tokenize"),
    "/detokenize": ("serving_tokenization", "create_detokenize"),
    "/v1/chat/completions/render": ("serving_render", "render_chat_request"),
    "/v1/messages/render": ("serving_render", "render_messages_request"),
    "/v1/completions/render": ("serving_render", "render_completion_request"),
    "/v1/responses/render": ("serving_render", "render_responses_request"),
    "/v1/chat/completions/derender": ("serving_derender", "derender_chat_response"),
    "/v1/completions/derender": ("serving_derender", "derender_completion_response"),
    "/v1/chat/completions/derender/stream": ("serving_derender", "derender_chat_stream_response"),
    "/v1/completions/derender/stream": (
        "serving_derender",
        "derender_completion_stream_response",
    ),
}
# Models that pool or hear have no experts: their handlers find none, whatever a request names.
NO_EXPERTS = re.compile(r"/(v[12]/)?(pooling|classify|score|rerank|embed\w*|audio/\w+|realtime)")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys by whose they are, and where `tenants.yaml` lies."""
    made = {name: make_key() for name in ("tenant", "admin")}
    tenants = [
        {"name": name, "keys": [hashed], "admin": name == "admin"}
        for name, (_, hashed) in made.items()
    ]
    path = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": tenants}))
    return {name: key for name, (key, _) in made.items()} | {"file": str(path)}


def build(
    monkeypatch: pytest.MonkeyPatch,
    api_key: list[str] | None,
    in_environment: str | None = None,
    **settings: Any,
) -> Any:
    """vLLM's application with all its routes and the plugin's."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for name in ("SERVER_DEV_MODE", "ALLOW_RUNTIME_LORA_UPDATING", "ENABLE_COHERE_API"):
        monkeypatch.setenv(f"VLLM_{name}", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "deltamux")
    monkeypatch.setenv("VLLM_API_KEY", in_environment or "")
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.api_key, args.additional_config = api_key, {"deltamux": settings}
    args.enable_scale_out = args.enable_tokenizer_info_endpoint = True
    args.tokens_only = args.enable_fault_tolerance = True
    args.allowed_origins = ["*"]
    return build_app(args, ("generate", "render"))


@pytest.fixture(scope="module")
def client(keys: dict[str, str]) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        app = build(monkeypatch, [API_KEY], tenants=keys["file"])
        yield TestClient(app, raise_server_exceptions=False)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def registered(app: Any) -> Iterator[tuple[str, str, Any]]:
    """Method, path and body of every route of an application."""
    for route in app.routes:
        for method in getattr(route, "methods", None) or ["GET"]:
            yield method, route.path, getattr(route, "body_field", None)


def in_the_sources() -> set[str]:
    """Every route that a file of vLLM declares."""
    import vllm.entrypoints

    (root,) = vllm.entrypoints.__path__
    pattern = re.compile(
        r"outer\.(get|post|put|delete|websocket)\(\s*\"(/[^\"]*)\"|add_api_route\(\s*\"(/[^\"]*)\""
    )
    found = set()
    for file in Path(root).rglob("api_router.py"):
        for method, path, added in pattern.findall(file.read_text()):
            verb = {"websocket": "GET", "": "POST"}.get(method, method.upper())
            found.add(f"{verb} {path or added}")
    return found


def test_every_route_that_is_registered_is_in_the_table(client: TestClient) -> None:
    found = {f"{method} {path}" for method, path, _ in registered(client.app)}
    unknown = {
        each
        for each in found
        if each not in ROUTES and not each.startswith(("HEAD", "GET /metrics", "GET /static"))
    }
    assert not unknown
    assert len(found) > 50


def test_every_route_that_a_source_of_vllm_declares_is_in_the_table() -> None:
    found = in_the_sources()
    assert len(found) > 50
    assert not {each for each in found if each not in ROUTES}


def test_a_route_that_nobody_has_thought_about_is_for_admins() -> None:
    assert access_of("POST", "/v1/something/new") is Access.ADMIN
    assert access_of("GET", "//v1/models") is Access.ADMIN
    assert access_of("PUT", "/v1/models") is Access.ADMIN


def test_every_route_that_takes_a_model_s_name_goes_through_the_gateway(client: TestClient) -> None:
    taking = set()
    for _, path, body in registered(client.app):
        annotation = getattr(getattr(body, "field_info", None), "annotation", None)
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        if any("model" in getattr(kind, "model_fields", {}) for kind in kinds):
            taking.add(path)
    assert len(taking) > 15
    assert not {path for path in taking if path not in MODEL_ROUTES}
    for path, (attribute, method) in MODEL_ROUTES.items():
        methods = {
            surface.HANDLERS.get(attribute),
            *surface.READING.get(attribute, ()),
            *surface.BASE_ONLY.get(attribute, ()),
        }
        assert method in methods, path


def test_the_sources_have_no_model_route_that_is_unknown() -> None:
    paths = {each.partition(" ")[2] for each in in_the_sources() if each.startswith("POST")}
    generating = {path for path in paths if ROUTES[f"POST {path}"] is Access.USER}
    other = {"/invocations", "/v1/responses/{response_id}/cancel"}
    unknown = {
        path for path in generating - set(MODEL_ROUTES) - other if not NO_EXPERTS.fullmatch(path)
    }
    assert not unknown


def test_the_methods_that_are_wrapped_are_vllm_s() -> None:
    """A method that vLLM renames would be left unguarded."""
    import vllm.entrypoints

    (root,) = vllm.entrypoints.__path__
    sources = "\n".join(path.read_text() for path in Path(root).rglob("serving.py"))
    sources += "\n".join(path.read_text() for path in Path(root).rglob("*_serving.py"))
    tables = (surface.READING, surface.BASE_ONLY, surface.OWNED)
    named = {method for table in tables for methods in table.values() for method in methods}
    for method in named | set(surface.HANDLERS.values()):
        assert f"async def {method}(" in sources, method


def concrete(path: str) -> str:
    return re.sub(r"\{\w+\}", "x", path)


def asked(client: TestClient, route: str, key: str | None) -> int:
    method, path = route.split(" ")
    return client.request(method, concrete(path), headers=bearer(key), json={}).status_code


ALLOWED = {
    Access.OPEN: {"none", "tenant", "admin", "api-key"},
    Access.METRICS: {"none", "tenant", "admin", "api-key"},
    Access.USER: {"tenant", "admin", "api-key"},
    Access.ADMIN: {"admin", "api-key"},
    Access.GONE: set(),
}


@pytest.mark.parametrize("route", [route for route in ROUTES if "realtime" not in route])
def test_each_kind_of_client_may_do_what_the_table_says(
    client: TestClient, keys: dict[str, str], route: str
) -> None:
    holders = {"none": None, "tenant": keys["tenant"], "admin": keys["admin"], "api-key": API_KEY}
    let_in = {name for name, key in holders.items() if asked(client, route, key) not in (401, 403)}
    assert let_in == ALLOWED[ROUTES[route]]


def test_a_websocket_without_a_key_is_closed(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/v1/realtime"):
        pass
    assert closed.value.code == 1008


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Basic KEY", "KEY", "Bearer KEY x", "Bearer  KEY", "bearer\tKEY"],
)
def test_a_key_in_another_form_opens_nothing(
    client: TestClient, keys: dict[str, str], authorization: str
) -> None:
    headers = {"Authorization": authorization.replace("KEY", keys["admin"])}
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "AuthenticationError"


@pytest.mark.parametrize(
    "path",
    [
        "//v1/experts",
        "/v1//experts",
        "/v1/experts/",
        "/%761/experts",
        "/health/../v1/experts",
        "/V1/experts",
        "/health/",
        "/health%2f",
        "/metrics/../v1/experts",
        "/ping/x",
        "/invocations/",
    ],
)
def test_no_spelling_of_a_path_gets_round_the_key(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 401
    assert client.post(path, json={}).status_code == 401


def test_vllm_s_own_key_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(build(monkeypatch, [API_KEY]), raise_server_exceptions=False)
    assert client.get("/v1/models").status_code == 401
    assert client.post("/invocations", json={}).status_code == 401
    assert client.get("/v1/models", headers=bearer(API_KEY)).status_code not in (401, 403)
    assert client.post("/v1/experts", headers=bearer(API_KEY), json={}).status_code == 400


def test_vllm_s_own_key_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    app = build(monkeypatch, None, in_environment=API_KEY)
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/version").status_code == 401
    assert client.get("/version", headers=bearer(API_KEY)).status_code == 200


def test_without_a_key_everything_but_what_is_gone_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(build(monkeypatch, None), raise_server_exceptions=False)
    for route in ROUTES:
        if "realtime" not in route:
            refused = asked(client, route, None) in (401, 403)
            assert refused == (ROUTES[route] is Access.GONE), route


def test_metrics_ask_for_a_key_where_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, str]
) -> None:
    app = build(monkeypatch, [API_KEY], metrics="key")
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=bearer(API_KEY)).status_code == 200
    assert client.get("/metrics/").status_code == 401


def test_a_browser_may_read_the_headers_and_why_it_was_refused(client: TestClient) -> None:
    answer = client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "*"
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-deltamux-expert", "retry-after"} <= set(exposed.split(", "))


def test_the_table_in_the_documents_is_the_one_that_is_checked() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| (yes|no) \| (yes|no) \| (yes|no) \| (`.+`) \|$", OPERATIONS.read_text(), re.M
    )
    kinds = ("none", "tenant", "admin")
    written = {
        route: {kind for kind, cell in zip(kinds, cells, strict=True) if cell == "yes"}
        for *cells, routes in rows
        for route in re.findall(r"`([^`]+)`", routes)
    }
    assert written == {route: ALLOWED[access] & {*kinds} for route, access in ROUTES.items()}
