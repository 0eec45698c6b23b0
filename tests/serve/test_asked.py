"""What a request asks: several prompts, what went before, hints; the decision log and feedback."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit.data import read_dataset
from deltamux.router.fit.fit import fit_router
from deltamux.serve.api import decision_log
from deltamux.serve.api.asked import RequestError, conversations, hints
from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.handlers import Gateway
from deltamux.serve.api.owners import Owners
from deltamux.serve.api.router_api import routing_router
from deltamux.serve.settings import RouterSettings

WORDS = {"math": "add subtract number sum", "sql": "select table column join", "general": "hi you"}
SQL, MATH = "select the table column join", "add subtract the number sum"


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_pair: Callable[..., tuple[Path, Path]]
) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    (folder / "data").mkdir()
    for domain, words in WORDS.items():
        each = words.split()
        rows = [
            {"prompt": f"{each[i % len(each)]} {each[i // 2 % len(each)]} {i}"} for i in range(40)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{domain}.jsonl").write_text(text)
    base = make_pair()[0]
    (folder / "base").symlink_to(base)
    fit_router(read_dataset(folder / "data"), folder / "router", base=str(base))
    return folder


def make(folder: Path, serves: Callable[[str], bool] = lambda _: True, **options: Any) -> AutoRoute:
    settings = RouterSettings(path=folder / "router", **options)
    return AutoRoute(settings, folder / "base", load_tokenizer(folder / "router"), serves)


def client_of(route: AutoRoute) -> TestClient:
    app = FastAPI()
    app.include_router(routing_router)
    app.state.deltamux = SimpleNamespace(route=route)
    return TestClient(app)


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with client_of(make(folder)) as client:
        yield client


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        ({"prompt": "a"}, [["a"]]),
        ({"prompt": ["a", "b"]}, [["a"], ["b"]]),
        ({"prompt": [1, 2]}, [[1, 2]]),
        ({"prompt": [[1, 2], [3]]}, [[1, 2], [3]]),
        ({"messages": user("a")}, [["a"]]),
        ({"messages": [user("a"), user("b")]}, [["a"], ["b"]]),
        ({"input": ["a", "b"]}, [["a", "b"]]),
        ({"prompt": []}, [[]]),
        ({}, [[]]),
        (SimpleNamespace(messages=None, prompt=["a"]), [["a"]]),
    ],
)
def test_each_prompt_of_a_request_is_a_conversation(request_: object, found: object) -> None:
    assert conversations(request_) == found


@pytest.mark.parametrize("order", [(SQL, MATH), (MATH, SQL)])
@pytest.mark.parametrize("form", ["texts", "ids", "chats"])
def test_prompts_of_different_experts_in_one_request_are_refused(
    folder: Path, order: tuple[str, str], form: str
) -> None:
    encode = load_tokenizer(folder / "router")
    asked: dict[str, Any] = {
        "texts": {"prompt": list(order)},
        "ids": {"prompt": [encode(text) for text in order]},
        "chats": {"messages": [user(text) for text in order]},
    }[form]
    route = make(folder)
    assert [made.expert for made in route.decide_each(asked)] == [
        "sql" if text == SQL else "math" for text in order
    ]
    with pytest.raises(RequestError, match=r"different models \(math, sql\); send a request for"):
        route.decide(asked)


def test_the_client_of_such_a_request_gets_400(folder: Path) -> None:
    gateway = Gateway(None, make(folder), None, None, owners=Owners())  # type: ignore[arg-type]
    request = SimpleNamespace(model="auto", prompt=[SQL, MATH])
    refused = asyncio.run(gateway.answer(None, "create_completion", request, None))
    assert refused.error.code == 400
    assert "send a request for each, or name the model" in refused.error.message


def test_prompts_of_one_expert_in_one_request_are_its(folder: Path) -> None:
    assert make(folder).decide({"messages": [user(SQL), user(SQL + " 1")]})[0].expert == "sql"


def test_the_decisions_on_several_prompts_are_shown(client: TestClient) -> None:
    answer = client.post("/v1/route", json={"prompt": [SQL, MATH]}).json()
    assert [made["expert"] for made in answer["decisions"]] == ["sql", "math"]


def test_a_follow_up_goes_on_with_the_response_it_names(folder: Path) -> None:
    route = make(folder)
    first = SimpleNamespace(input=SQL, request_id="resp_1", previous_response_id=None)
    assert route.decide(first)[0].expert == "sql"
    second = SimpleNamespace(input="hi", request_id="resp_2", previous_response_id="resp_1")
    assert route.decide(second)[0].expert == "sql"
    third = SimpleNamespace(input="you", request_id="resp_3", previous_response_id="resp_2")
    assert route.decide(third)[0].expert == "sql"
    unknown = SimpleNamespace(input="hi", request_id="resp_4", previous_response_id="resp_9")
    assert route.decide(unknown)[0].expert is None


@pytest.mark.parametrize("as_text", [False, True])
def test_only_allowed_experts_answer(folder: Path, as_text: bool) -> None:
    route = make(folder)
    for allow, expert in (["math"], None), (["sql", "math"], "sql"), ([], None):
        said: object = {"allow": allow}
        asked = {"prompt": SQL, "metadata": {"deltamux": json.dumps(said) if as_text else said}}
        assert route.decide(asked)[0].expert == expert


@pytest.mark.parametrize("said", ["{", [], {"allow": "sql"}, {"allow": [1]}, {"deny": []}, 3])
def test_hints_of_another_form_are_refused(client: TestClient, said: object) -> None:
    with pytest.raises(RequestError, match=r"metadata\.deltamux"):
        hints({"metadata": {"deltamux": said}})
    answer = client.post("/v1/route", json={"prompt": SQL, "metadata": {"deltamux": said}})
    assert answer.status_code == 400
    assert "metadata.deltamux" in answer.json()["error"]["message"]


@pytest.mark.parametrize("metadata", [None, {}, {"user": "x"}, {"deltamux": {"allow": None}}])
def test_other_metadata_is_no_hint(metadata: object) -> None:
    assert hints({"metadata": metadata}).allow is None


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("prompts", ["hashed", "whole"])
def test_decisions_and_feedback_are_logged(folder: Path, tmp_path: Path, prompts: str) -> None:
    log = tmp_path / "logs" / "decisions.jsonl"
    route = make(folder, log=log, log_prompts=prompts)
    route.decide(SimpleNamespace(prompt=SQL, request_id="1"))
    with client_of(route) as client:
        good = client.post("/v1/route/feedback", json={"id": "cmpl-1", "expert": "math"})
        stranger = client.post("/v1/route/feedback", json={"id": "cmpl-9", "expert": "math"})
        nobody = client.post("/v1/route/feedback", json={"id": "cmpl-1", "expert": "law"})
    assert [a.status_code for a in (good, stranger, nobody)] == [200, 404, 400]
    decision, feedback = rows_of(log)
    assert (decision["id"], decision["expert"], decision["domain"]) == ("1", "sql", "sql")
    assert decision.get("prompt") == ([SQL] if prompts == "whole" else None)
    assert (SQL in log.read_text()) == (prompts == "whole")
    assert (feedback["id"], feedback["feedback"]) == ("1", "math")


@pytest.mark.parametrize(
    ("request_", "header", "response"),
    [
        ({"prompt": SQL, "request_id": "1"}, "mine", "cmpl-mine"),
        ({"messages": [{"role": "user", "content": SQL}]}, "chatcmpl-1", "chatcmpl-chatcmpl-1"),
        ({"input": SQL, "request_id": "resp_7"}, "mine", "resp_7"),
    ],
)
def test_feedback_finds_a_response_that_the_client_named(
    folder: Path, tmp_path: Path, request_: dict[str, Any], header: str, response: str
) -> None:
    log = tmp_path / "log"
    route = make(folder, log=log)
    route.decide(request_, client_id=header)
    with client_of(route) as client:
        answer = client.post("/v1/route/feedback", json={"id": response, "expert": "math"})
        stranger = client.post("/v1/route/feedback", json={"id": "other", "expert": "math"})
    assert [answer.status_code, stranger.status_code] == [200, 404]
    decision, feedback = rows_of(log)
    assert decision["id"] == feedback["id"]


def test_a_request_is_logged_by_the_name_that_its_client_gave_it(
    folder: Path, tmp_path: Path
) -> None:
    class NotServed(Exception):
        """Ends the request after its decision."""

    def get(_name: str) -> None:
        raise NotServed

    log = tmp_path / "log"
    registry: Any = SimpleNamespace(get=get)
    nobody: Any = None
    gateway = Gateway(registry, make(folder, log=log), nobody, nobody, owners=nobody, end_id=None)
    request = SimpleNamespace(model="auto", prompt=SQL, request_id="1")
    raw = SimpleNamespace(headers=Headers({"x-request-id": "mine"}))
    with pytest.raises(NotServed):
        asyncio.run(gateway.answer(None, "create_completion", request, raw))
    assert rows_of(log)[0]["id"] == "mine"


def test_nothing_is_logged_unless_it_is_asked_for(folder: Path) -> None:
    with client_of(make(folder)) as client:
        answer = client.post("/v1/route/feedback", json={"id": "1", "expert": "math"})
    assert answer.status_code == 400
    assert "set router.log" in answer.json()["error"]["message"]


def test_the_log_is_bounded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "MAX_BYTES", 400)
    route = make(folder, log=tmp_path / "log")
    for number in range(20):
        route.decide(SimpleNamespace(prompt=SQL, request_id=str(number)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert all(path.stat().st_size <= 400 for path in tmp_path.iterdir())
    assert rows_of(tmp_path / "log")[-1]["id"] == "19"


def test_a_log_that_cannot_be_written_fails_no_request(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    route = make(folder, log=tmp_path / "file" / "log")
    assert route.decide(SimpleNamespace(prompt=SQL, request_id="1"))[0].expert == "sql"


def test_experts_that_nobody_serves_are_shown(folder: Path) -> None:
    with client_of(make(folder, serves=lambda name: name == "sql")) as client:
        assert client.get("/v1/router").json()["not_served"] == ["math"]
