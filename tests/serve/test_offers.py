"""Experts that come by themselves: a watched folder, a hub, a state file; and those that leave by themselves."""

import asyncio
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltamux.serve import hub as module
from deltamux.serve.api import keepalive
from deltamux.serve.api.expert import Expert, ExpertError, Limits, Served, read_expert
from deltamux.serve.api.saved import SavedExperts
from deltamux.serve.api.watch import Watch
from deltamux.serve.hub import local_directory
from deltamux.serve.settings import PluginSettings


class Registry:
    """Reads experts as the server's registry does, and offers them to nobody."""

    def __init__(self) -> None:
        self.offered: dict[str, Expert] = {}
        self.rested: list[str] = []
        self.reads = 0

    def __iter__(self) -> Any:
        return iter(self.offered.values())

    def get(self, name: str) -> Expert | None:
        return self.offered.get(name)

    async def register(self, name: str, path: Path, origin: Any) -> Expert:
        self.reads += 1
        try:
            expert = read_expert(name, path, Served(64, 272, lambda _: None))
        except (ValueError, OSError) as error:
            raise ExpertError(str(error)) from error
        expert.origin = origin
        self.offered[name] = expert
        return expert

    async def delete(self, name: str) -> None:
        del self.offered[name]

    def rest(self, expert: Expert) -> None:
        self.rested.append(expert.name)


def look(watch: Watch, times: int = 2, **how: Any) -> None:
    async def looks() -> None:
        for _ in range(times):
            await watch.look(**how)
        await asyncio.sleep(0)

    asyncio.run(looks())


@pytest.fixture
def registry() -> Registry:
    return Registry()


def test_an_artifact_is_taken_when_it_is_complete_and_never_before(
    tmp_path: Path, registry: Registry, make_artifact: Callable[..., Path]
) -> None:
    watch: Any = Watch(tmp_path, registry)  # type: ignore[arg-type]
    copy = tmp_path / "math"
    copy.mkdir()
    weights = (make_artifact() / "model.safetensors").read_bytes()
    for file in make_artifact().iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, copy)
            look(watch)
            assert registry.offered == {}
    for length in (0, 8, 1000, len(weights) - 1):
        (copy / "model.safetensors").write_bytes(weights[:length])
        look(watch)
        assert registry.offered == {}
    (copy / "model.safetensors").write_bytes(weights)
    look(watch, times=1)
    assert registry.offered == {}
    look(watch, times=1)
    assert registry.offered["math"].origin == "watched"


def test_what_is_refused_is_not_read_again_until_it_changes(
    tmp_path: Path, registry: Registry, make_artifact: Callable[..., Path]
) -> None:
    watch: Any = Watch(tmp_path, registry)  # type: ignore[arg-type]
    shutil.copytree(make_artifact(), tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"")
    look(watch, times=5)
    assert registry.reads == 1
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"12345678")
    look(watch, times=5)
    assert registry.reads == 2


def test_a_directory_that_goes_takes_its_expert_with_it_and_no_other(
    tmp_path: Path, registry: Registry, make_artifact: Callable[..., Path]
) -> None:
    watch: Any = Watch(tmp_path, registry)  # type: ignore[arg-type]
    registry.offered["own"] = Expert("own", Path("/elsewhere"))
    for name in ("own", "guest", "stays"):
        shutil.copytree(make_artifact(), tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes").mkdir()
    look(watch, times=1, at_start=True)
    assert set(registry.offered) == {"own", "guest", "stays"}
    assert registry.offered["own"].path == Path("/elsewhere")
    for name in ("own", "guest"):
        shutil.rmtree(tmp_path / name)
    look(watch)
    assert set(registry.offered) == {"own", "stays"}


def test_a_folder_that_cannot_be_read_takes_nothing_away(
    tmp_path: Path, registry: Registry, make_artifact: Callable[..., Path]
) -> None:
    folder = tmp_path / "experts"
    folder.mkdir()
    shutil.copytree(make_artifact(), folder / "math")
    watch: Any = Watch(folder, registry)  # type: ignore[arg-type]
    look(watch, times=1, at_start=True)
    folder.rename(tmp_path / "unmounted")
    look(watch)
    assert set(registry.offered) == {"math"}


def test_added_experts_are_kept_and_configured_ones_are_not(tmp_path: Path) -> None:
    saved = SavedExperts(tmp_path / "state" / "experts.json")
    assert saved.read() == ()
    added = Expert("law", Path("/x/law"), source=Path("/x/law"), origin="added", pinned=True)
    saved.write([added, Expert("math", Path("/x/math"), source=Path("/x/math"))])
    (kept,) = SavedExperts(tmp_path / "state" / "experts.json").read()
    assert (kept.name, kept.path, kept.pin) == ("law", Path("/x/law"), True)


def test_a_state_that_cannot_be_read_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "experts.json"
    path.write_text('{"version": 1, "experts": [{"name": "a/b"}]}')
    saved = SavedExperts(path)
    assert saved.read() == ()
    saved.write([Expert("law", Path("/x"), source=Path("/x"), origin="added")])
    assert "a/b" in path.read_text()
    SavedExperts(None).write([])


@pytest.fixture(params=["silent", "refusing", "offline"])
def hub(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Path]:
    """A hub that gives nothing: the folder of the cache."""
    from huggingface_hub import constants

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if request.param == "refusing":
        listener.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    yield tmp_path
    listener.close()


def test_a_hub_that_gives_nothing_is_one_line(hub: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^'nobody/here@main' .* the hub does not give it: [^\n]+$"
    ):
        local_directory(Path("nobody/here@main"))


def test_what_was_fetched_before_is_served_though_the_hub_gives_nothing(hub: Path) -> None:
    repository = hub / "models--nobody--here"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert local_directory(Path("nobody/here@main")) == snapshot


def test_a_directory_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    for path in (Path("org/name@main"), tmp_path / "gone", Path("experts/math")):
        assert local_directory(path) == path


def test_who_is_asked_for_nothing_leaves_after_its_time_and_pinned_ones_stay(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, ttl, pinned in (("old", 0.001, False), ("kept", None, False), ("pin", 0.001, True)):
        expert = Expert(name, Path(), request=object(), limits=Limits(ttl=ttl), pinned=pinned)
        registry.offered[name] = expert

    async def scene() -> None:
        looking = asyncio.create_task(keepalive.keep_alive(registry))  # type: ignore[arg-type]
        while not registry.rested:
            await asyncio.sleep(0)
        looking.cancel()

    monkeypatch.setattr(keepalive, "FASTEST", 0.001)
    asyncio.run(scene())
    assert set(registry.rested) == {"old"}


def test_preload_names_experts_that_there_are() -> None:
    content: dict[str, Any] = {
        "experts": [{"name": "math", "path": "/m"}, {"name": "sql", "path": "/s"}]
    }
    settings = PluginSettings.model_validate(content | {"preload": ["sql"]})
    assert [settings.preloads(name) for name in ("math", "sql")] == [False, True]
    assert PluginSettings.model_validate(content).preloads("math")
    with pytest.raises(ValueError, match="preload names 'law', which is none of the experts"):
        PluginSettings.model_validate(content | {"preload": ["law"]})
