"""Who answers: the router's choice, the fallback, and what happens when the router fails."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit.data import read_dataset
from deltamux.router.fit.fit import fit_router
from deltamux.serve.api.autoroute import AutoRoute, explicit
from deltamux.serve.settings import RouterSettings

WORDS = {"math": "add subtract number sum", "sql": "select table column join", "general": "hi you"}


@pytest.fixture(scope="module")
def router(
    tmp_path_factory: pytest.TempPathFactory, make_pair: Callable[..., tuple[Path, Path]]
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("router")
    for domain, words in WORDS.items():
        each = words.split()
        rows = [
            {"prompt": f"{each[i % len(each)]} {each[i // 2 % len(each)]} {i}"} for i in range(40)
        ]
        path = folder / "data" / f"{domain}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = make_pair()[0]
    fit_router(read_dataset(folder / "data"), folder / "router", base=str(base))
    return folder / "router", base


def make(router: tuple[Path, Path], fallback: str = "base") -> AutoRoute:
    path, base = router
    settings = RouterSettings(path=path, fallback=fallback)
    return AutoRoute(settings, base, load_tokenizer(path), lambda name: name != "gone")


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "user", "content": "select the table column join"}]},
        {"prompt": "select the table column join"},
        {"input": "select the table column join"},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "select table join"}]}
            ]
        },
        SimpleNamespace(messages=[{"role": "user", "content": "select the table column join"}]),
    ],
)
def test_every_shape_of_request_is_routed(router: tuple[Path, Path], request_: object) -> None:
    decision, seconds = make(router).decide(request_)
    assert (decision.expert, decision.reason) == ("sql", "router")
    assert 0 < seconds < 1


def test_token_ids_are_routed_without_a_tokenizer(router: tuple[Path, Path]) -> None:
    route = make(router)
    ids = load_tokenizer(router[0])("select the table column join")
    for prompt in (ids, [ids]):
        assert route.decide({"prompt": prompt})[0].expert == "sql"


def test_the_fallback_answers_where_the_router_abstains(router: tuple[Path, Path]) -> None:
    request = {"prompt": "hi you"}
    assert make(router).decide(request)[0].expert is None
    decision, _ = make(router, fallback="math").decide(request)
    assert (decision.expert, decision.reason) == ("math", "abstain")


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign tokenizer"])
def test_a_router_that_cannot_be_used_leaves_requests_to_the_base(
    router: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    path, base = tmp_path / "router", router[1]
    if damage != "missing":
        path.mkdir()
        for file in router[0].iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    if damage == "truncated":
        tables = path / "router.safetensors"
        tables.write_bytes(tables.read_bytes()[:-50])
    if damage == "foreign tokenizer":
        base = tmp_path / "base"
        base.mkdir()
        (base / "tokenizer.json").write_text("{}")
    route = AutoRoute(RouterSettings(path=path), base, lambda text: [len(text)], lambda _: True)
    decision, _ = route.decide({"prompt": "select the table column join"})
    assert route.error
    assert (decision.expert, decision.reason) == (None, "router-error")


def test_a_router_that_fails_on_a_request_is_no_error_to_the_client(
    router: tuple[Path, Path],
) -> None:
    def broken(text: str) -> list[int]:
        raise RuntimeError("no tokenizer today")

    path, base = router
    route = AutoRoute(RouterSettings(path=path), base, broken, lambda _: True)
    decision, _ = route.decide({"prompt": "select"})
    assert (decision.expert, decision.reason) == (None, "router-error")


@pytest.mark.parametrize(("served", "answers"), [({"math"}, "math"), (set(), None)])
def test_an_expert_that_is_not_served_leaves_its_requests_to_the_fallback(
    router: tuple[Path, Path], served: set[str], answers: str | None
) -> None:
    path, base = router
    settings = RouterSettings(path=path, fallback="math")
    route = AutoRoute(settings, base, load_tokenizer(path), served.__contains__)
    decision, _ = route.decide({"prompt": "select the table column join"})
    assert (decision.expert, decision.reason) == (answers, "router-error")


def test_a_server_without_a_router_answers_auto_from_the_base(tmp_path: Path) -> None:
    route = AutoRoute(None, tmp_path, lambda text: [], lambda _: True)
    assert route.error == "no router is configured"
    assert route.decide({"prompt": "x"})[0].reason == "router-error"


def test_a_client_that_names_the_model_is_not_routed() -> None:
    assert explicit("math").to_json() == {
        "expert": "math",
        "domain": "math",
        "confidence": 1.0,
        "reason": "explicit",
    }
    assert explicit(None).expert is None
