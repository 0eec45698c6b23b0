"""The images' entry command: what it refuses at once, and a server that it started, to its end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deltamux.serve.container import KEY_VARIABLE, VLLM_KEY_VARIABLE, prepare
from deltamux.serve.launch import free_port

pytestmark = pytest.mark.vllm

KEY = "a-key"
OK, REFUSED = 200, "refused"
ENTRY = [sys.executable, "-m", "deltamux.serve.container"]
Change = Callable[[Path, dict[str, Any]], dict[str, str] | None]


@pytest.fixture
def deployed(live: Any, tmp_path: Path) -> Path:
    """A folder as it is mounted into the container, of links to the live server's files."""
    for name in ("base", "math", "sql", "router"):
        shutil.copytree(live.folder / name, tmp_path / name, copy_function=os.link)
    config = yaml.safe_load((live.folder / "deltamux.yaml").read_text())
    config["experts"] = [{"name": name, "path": name} for name in ("math", "sql")]
    (tmp_path / "deltamux.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def without_key(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    return {KEY_VARIABLE: ""}


def key_file(text: str | None) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> dict[str, str]:
        if text is not None:
            (folder / "key").write_text(text)
        return {KEY_VARIABLE: "", "DELTAMUX_API_KEY_FILE": str(folder / "key")}

    return change


def setting(*path: str | int, value: Any) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        place: Any = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def removed(name: str) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def truncated(name: str) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def other_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.unlink()
    path.write_text(json.dumps(tokenizer))


def cache_below_a_file(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    (folder / "file").touch()
    return {"HF_HOME": str(folder / "file" / "models")}


WRONG: dict[str, tuple[Change, str]] = {
    "no key": (without_key, "no API key: DELTAMUX_API_KEY is not set"),
    "no key file": (key_file(None), "is not a file"),
    "empty key file": (key_file("\n"), "must be one word"),
    "key of two words": (key_file("two words"), "must be one word"),
    "no configuration": (removed("deltamux.yaml"), "mount the folder with your deltamux.yaml"),
    "unknown setting": (setting("sloots", value=3), "sloots"),
    "no base": (removed("base"), "neither a directory nor a hub id"),
    "base without config": (removed("base/config.json"), "has no config.json"),
    "no expert": (removed("sql"), "the expert 'sql' lies at"),
    "expert without manifest": (removed("sql/delta_config.json"), "the expert 'sql' cannot be"),
    "truncated expert": (truncated("sql/model.safetensors"), "the expert 'sql' cannot be served"),
    "name that breaks out": (
        setting("experts", 0, "name", value='a"} 1\nx{b="'),
        "is not a deltamux configuration",
    ),
    "no router": (removed("router"), "the router cannot be used"),
    "truncated router": (truncated("router/router_config.json"), "the router cannot be used"),
    "router of another tokenizer": (other_tokenizer, "the router cannot be used"),
    "cache on no folder": (cache_below_a_file, "cannot be made"),
    "drain that is no number": (lambda *_: {"DELTAMUX_DRAIN_SECONDS": "soon"}, "got 'soon'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_deployment_is_refused_by_name(deployed: Path, case: str) -> None:
    change, said = WRONG[case]
    config = yaml.safe_load((deployed / "deltamux.yaml").read_text())
    environment = {KEY_VARIABLE: KEY} | (change(deployed, config) or {})
    path = deployed / "deltamux.yaml"
    if path.exists():
        path.write_text(yaml.safe_dump(config))
    with pytest.raises((ValueError, OSError)) as caught:
        prepare([str(path)], environment)
    assert said in str(caught.value)


@pytest.mark.parametrize("case", ["no key", "no expert", "name that breaks out"])
def test_the_entry_command_ends_with_one_line(deployed: Path, case: str) -> None:
    change, said = WRONG[case]
    config = yaml.safe_load((deployed / "deltamux.yaml").read_text())
    changed = change(deployed, config) or {}
    (deployed / "deltamux.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [*ENTRY, deployed / "deltamux.yaml"],
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
        env=os.environ | {KEY_VARIABLE: KEY, "PYTHONSAFEPATH": "1"} | changed,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_right_deployment_hands_the_key_to_vllm_alone(deployed: Path) -> None:
    (deployed / "key").write_text(f"{KEY}\n")
    given = {"DELTAMUX_API_KEY_FILE": str(deployed / "key"), "OTHER": "1"}
    environment, command = prepare([str(deployed / "deltamux.yaml"), "--port", "1"], given)
    assert environment == {VLLM_KEY_VARIABLE: KEY, "OTHER": "1"}
    assert KEY not in " ".join(command)
    assert command[-2:] == ["--shutdown-timeout", "60"]


@dataclass
class Started:
    """A server from the entry command, and what a scraper got while it started."""

    url: str
    process: Any = None
    scrapes: list[int | str] = field(default_factory=list)

    def get(self, path: str, key: str = KEY) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=300)


@pytest.fixture
def started(
    deployed: Path, server_environment: dict[str, str], eventually: Callable[..., Any]
) -> Iterator[Started]:
    """A server that a scraper asked for its metrics from before it listened until it answered."""
    port = free_port()
    (deployed / "key").write_text(KEY)
    environment = server_environment | {
        "PYTHONSAFEPATH": "1",
        "DELTAMUX_API_KEY_FILE": str(deployed / "key"),
        "HF_HOME": str(deployed / "cache" / "models"),
        "VLLM_CACHE_ROOT": str(deployed / "cache" / "vllm"),
    }
    found = Started(f"http://127.0.0.1:{port}")
    done = threading.Event()
    scraper = threading.Thread(target=scrape, args=(found, done), daemon=True)
    scraper.start()
    eventually(lambda: found.scrapes)
    command = [*ENTRY, deployed / "deltamux.yaml", "--host", "127.0.0.1", "--port", str(port)]
    with (deployed / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    found.process = process
    try:
        eventually(lambda: answers(found, deployed / "log") and OK in found.scrapes)
        done.set()
        yield found
    finally:
        done.set()
        scraper.join()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def scrape(server: Started, done: threading.Event) -> None:
    while not done.wait(0.02):
        try:
            server.scrapes.append(httpx.get(f"{server.url}/metrics", timeout=10).status_code)
        except httpx.TransportError:
            server.scrapes.append(REFUSED)


def answers(server: Started, log: Path) -> bool:
    """Whether the server is healthy; fails where it has ended."""
    assert server.process.poll() is None, log.read_text()
    try:
        return server.get("/health").status_code == OK
    except httpx.TransportError:
        return False


def test_the_entry_command_serves_under_scrapes_and_drains_on_sigterm(started: Started) -> None:
    assert set(started.scrapes) == {REFUSED, OK}
    assert started.get("/v1/models").status_code == 200
    assert started.get("/v1/models", key="wrong").status_code == 401
    assert started.get("/v1/ready").json() == {"ready": True, "reasons": []}
    command = Path(f"/proc/{started.process.pid}/cmdline").read_text()
    assert KEY not in command
    body = {
        "model": "math",
        "messages": [{"role": "user", "content": "what is it?"}],
        "max_tokens": 450,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{started.url}/v1/chat/completions"
    events = []
    with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as response:
        for line in response.iter_lines():
            if not events and line:
                started.process.send_signal(signal.SIGTERM)
            if line:
                events.append(line)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 450
    assert started.process.wait(300) == 0


def test_files_that_only_their_owner_reads_are_named(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = deployed / "sql" / "model.safetensors"
    readable = os.access

    # The tests may run as root, who reads everything.
    def as_another_user(path: Any, mode: int) -> bool:
        return Path(path) != weights and readable(path, mode)

    monkeypatch.setattr(os, "access", as_another_user)
    with pytest.raises(ValueError, match=r"model.safetensors' is not readable for user \d+: chmod"):
        prepare([str(deployed / "deltamux.yaml")], {KEY_VARIABLE: KEY})
