"""Tenants: their file, their keys, and what is left of their minute."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deltamux.serve.api.expert import ExpertError
from deltamux.serve.api.guard import MOST_BODY_BYTES, Doors, Guard
from deltamux.serve.api.limits import Bucket, Limits
from deltamux.serve.api.owners import Owners
from deltamux.serve.api.roots import Roots
from deltamux.serve.api.tenants import (
    Keys,
    Tenant,
    TenantSettings,
    key_hash,
    load_tenants,
    make_key,
)
from deltamux.serve.api.worker import answered
from deltamux.serve.cli import app

HASH = "sha256:" + "0" * 64


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.seconds_until(1) == pytest.approx(1.0)
    clock.now += 10
    assert bucket.seconds_until(1) == 0.0
    assert bucket.seconds_until(20) == pytest.approx(10.0)
    clock.now += 1e6
    bucket.take(60)
    assert bucket.seconds_until(1) == pytest.approx(1.0)


def test_requests_are_let_in_until_the_minute_is_used_up() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=3, clock=clock)
    assert [limits.enter() for _ in range(3)] == [None] * 3
    assert limits.enter() == ("requests", 20)
    clock.now += 20
    assert limits.enter() is None
    assert limits.enter() == ("requests", 20)


def test_tokens_that_were_spent_have_to_come_back_first() -> None:
    clock = Clock()
    limits = Limits(tokens_per_minute=60, clock=clock)
    assert limits.enter() is None
    limits.spend(120)
    assert limits.enter() == ("tokens", 60 + 1)
    clock.now += 60.5
    assert limits.enter() is None


def test_a_place_is_given_back_when_a_request_ends() -> None:
    limits = Limits(concurrency=1)
    assert limits.enter() is None
    assert limits.enter() == ("concurrency", 1)
    limits.leave()
    assert limits.enter() is None


def test_without_limits_everybody_comes_in() -> None:
    limits = Limits()
    assert [limits.enter() for _ in range(1000)] == [None] * 1000
    limits.spend(10**9)
    assert limits.enter() is None


def test_what_was_refused_takes_nothing() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=2, concurrency=1, clock=clock)
    assert limits.enter() is None
    for _ in range(10):
        assert limits.enter() == ("concurrency", 1)
    limits.leave()
    assert limits.enter() is None


def settings(**changes: object) -> TenantSettings:
    return TenantSettings.model_validate({"name": "team", "keys": [HASH]} | changes)


def test_a_key_opens_for_the_one_whose_it_is() -> None:
    (first, first_hash), (second, second_hash) = make_key(), make_key()
    tenants = [settings(keys=[first_hash]), settings(name="boss", keys=[second_hash], admin=True)]
    keys = Keys(tenants, ["own"])
    found = {word: keys.owner(f"Bearer {word}") for word in (first, second, "own")}
    assert [tenant and tenant.name for tenant in found.values()] == ["team", "boss", "api-key"]
    assert [tenant and tenant.admin for tenant in found.values()] == [False, True, True]
    for wrong in (None, "", "Bearer", first, f"Basic {first}", f"Bearer {first} ", "Bearer \udcff"):
        assert keys.owner(wrong) is None


def test_without_keys_none_is_asked_for() -> None:
    assert not Keys().required
    assert Keys(api_keys=["own"]).required


def test_a_made_key_is_long_and_its_hash_is_what_is_kept() -> None:
    key, hashed = make_key()
    assert len(key) > 40
    assert key_hash(key) == hashed
    assert make_key()[0] != key


@pytest.mark.parametrize("key", ["short", "x" * 21, "with spaces " * 3, "ü" * 30])
def test_a_key_that_may_be_guessed_gets_no_hash(key: str) -> None:
    with pytest.raises(ValueError, match="at least 22 characters"):
        key_hash(key)


def test_the_command_makes_a_key_and_hashes_one() -> None:
    made = CliRunner().invoke(app, ["key"]).stdout.split()
    assert key_hash(made[1]) == made[3]
    hashed = CliRunner().invoke(app, ["key", "--stdin"], input=made[1] + "\n")
    assert hashed.stdout.strip() == made[3]


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("tenants: []", "tenants: List should have at least 1 item"),
        ("tenants: [{name: a, keys: []}]", "tenants.0.keys: List should have at least 1 item"),
        ("tenants: [{name: a, keys: [secret]}]", "tenants.0.keys.0: String should match"),
        (f"tenants: [{{name: a b, keys: ['{HASH}']}}]", "tenants.0.name"),
        (f"tenants: [{{name: a, keys: ['{HASH}'], quota: 3}}]", "tenants.0.quota"),
        (f"tenants: [{{name: a, keys: ['{HASH}'], concurrency: 0}}]", "tenants.0.concurrency"),
        (f"tenants: [{{name: api-key, keys: ['{HASH}']}}]", "the name is taken"),
        (
            f"tenants: [{{name: a, keys: ['{HASH}']}}, {{name: b, keys: ['{HASH}']}}]",
            "is given twice",
        ),
        ("tenants: [", "is not YAML"),
        ("[]", "is no list of tenants"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_key(
    tmp_path: Path, content: str, finding: str
) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tenants\.yaml") as refused:
        load_tenants(path)
    assert finding in str(refused.value)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    content = {"version": 1, "tenants": [{"name": "a", "keys": [HASH], "experts": ["math"]}]}
    path.write_text(yaml.safe_dump(content))
    (tenant,) = Keys(load_tenants(path)).tenants
    assert tenant.may_use("math")
    assert tenant.may_use("base")
    assert not tenant.may_use("sql")


def test_the_prefix_cache_is_apart_for_each_tenant_and_salt() -> None:
    first, second = Tenant("a"), Tenant("b")
    salts = {tenant.cache_salt(own) for tenant in (first, second) for own in (None, "x")}
    assert len(salts) == 4
    assert first.cache_salt("x") == Tenant("a").cache_salt("x")


def test_a_response_is_its_tenant_s() -> None:
    owners, first, second = Owners(), Tenant("a"), Tenant("b")
    owners.note("resp_1", first)
    assert owners.may_read("resp_1", first)
    assert not owners.may_read("resp_1", second)
    assert owners.is_of_another("resp_1", second)
    assert not owners.may_read("resp_2", first)
    assert owners.may_read("resp_1", None)
    assert owners.may_read("resp_1", Tenant("boss", admin=True))


def test_roots_bind_directories_and_the_files_in_them(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "expert", outside):
        folder.mkdir(parents=True)
    roots = Roots([root])
    assert roots.inside(root / "expert") == root / "expert"
    (root / "expert" / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="none of the folders"):
        roots.inside(root / "expert")
    (root / "loop").symlink_to("loop")
    for path in (outside, root / ".." / "outside", root / "loop" / "x", tmp_path / "rooted"):
        with pytest.raises(ValueError, match=r"none of the folders|leads nowhere"):
            roots.inside(path)
    with pytest.raises(ValueError, match="absolute path"):
        roots.inside(Path("expert"))


def test_a_clock_that_is_set_back_makes_no_time_negative() -> None:
    from deltamux.router.decide.decision import Decision
    from deltamux.serve.observability.journal import RequestRecord

    decision = Decision("math", "math", 1.0, "explicit", {})
    record = RequestRecord("math", decision, arrival=time.time() + 3600)
    assert record.seconds == 0.0
    assert record.to_json()["e2e_seconds"] == 0.0


def test_tokens_that_come_behind_the_end_of_a_response_are_charged() -> None:
    from deltamux.router.decide.decision import Decision
    from deltamux.serve.observability import journal

    tenant = Tenant("team", limits=Limits(tokens_per_minute=100))
    mark = journal.current_tenant.set(tenant)
    try:
        book = journal.Journal()
        record = book.begin("math", Decision("math", "math", 1.0, "explicit", {}), time.time())
    finally:
        journal.current_tenant.reset(mark)
    record.spend("prompt", 30)
    assert tenant.limits.enter() is None
    book.close(record, "ok")
    record.spend("generated", 75)
    refused = tenant.limits.enter()
    assert refused is not None
    assert refused[0] == "tokens"


def ask(headers: list[tuple[bytes, bytes]], parts: list[bytes]) -> tuple[list[Any], list[Any]]:
    """What a guard sends, and what the application behind it receives of a body in parts."""
    sent: list[Any] = []
    received: list[Any] = []
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.extend([await receive() for _ in parts])

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(Guard(app, Doors())(scope, receive, send))
    return sent, received


@pytest.mark.parametrize("length", [str(MOST_BODY_BYTES + 1), "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read(length: str) -> None:
    sent, received = ask([(b"content-length", length.encode())], [b"x"])
    assert sent[0]["status"] == 413
    assert not received


def test_a_body_that_grows_too_large_is_given_up() -> None:
    half = b"x" * (MOST_BODY_BYTES // 2)
    _, received = ask([], [half, half, b"x"])
    assert [each["type"] for each in received] == ["http.request"] * 2 + ["http.disconnect"]


class Engine:
    """An engine that gives no answer any more."""

    errored = False

    async def reset_prefix_cache(self) -> None:
        self.errored = True
        await asyncio.Event().wait()


def test_a_call_to_an_engine_that_has_ended_is_given_up() -> None:
    engine = Engine()

    async def ask() -> None:
        await answered(engine, engine.reset_prefix_cache())

    with pytest.raises(ExpertError, match="the engine has ended"):
        asyncio.run(ask())
