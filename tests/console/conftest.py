"""The console in Debian's chromium, over a real server with tiny models; one of each for all tests here."""

import json
import shutil
import socket
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deltamux.serve.demo.server import Server, deltamux_serve, running_server
from deltamux.serve.launch import free_port

BUILD = Path(__file__).parents[2] / "build"
KEY = "secret"
# What the tests of the playground ask.
PROMPT = "select the column where rows join"
PATIENCE_MS = 60_000.0
# Of the Mozilla Public License 2.0; fetched for these tests alone and no part of any package.
AXE = "axe-core@4.14.1"
# A domain and a name as long as they may be; the domain would run as markup if it were taken for that.
DOMAIN = "<img src=x onerror=\"document.title='taken'\"> &amp; <b>weather"
LONG_NAME = "an-expert-with-a-name-as-long-as-the-rules-allow.it_has_64-chars"
MARKED = "<i>&lt;damaged"
assert len(LONG_NAME) == 64


@pytest.fixture(scope="session")
def chromium() -> dict[str, Any]:
    """How playwright starts Debian's chromium: the installed one, or one unpacked under `build/`.

    Unpacking needs no root and changes nothing on the machine.
    """
    options: dict[str, Any] = {"args": ["--no-sandbox"]}
    installed = shutil.which("chromium")
    if installed:
        return options | {"executable_path": installed}
    folder = BUILD / "chromium"
    binary = folder / "usr" / "lib" / "chromium" / "chromium"
    if not binary.is_file():
        try:
            _unpack_package("chromium", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"chromium is not installed, and apt-get cannot fetch it: {error}")
    (libraries,) = (folder / "usr" / "lib").glob("*-linux-gnu")
    # Some packages keep libraries in a folder of their own, which they find only where they are installed.
    own = {path.parent for path in libraries.glob("*/lib*.so*")}
    paths = ":".join(map(str, [libraries, *sorted(own)]))
    return options | {"executable_path": binary, "env": {"LD_LIBRARY_PATH": paths}}


def _unpack_package(name: str, folder: Path) -> None:
    """Unpack a Debian package, and those that it needs and the machine lacks."""
    for place in ("lists/partial", "cache/archives/partial"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    places = {"State::Lists": folder / "lists", "Cache": folder / "cache"}
    apt = ["apt-get", "-qq", "-oDebug::NoLocking=1"]
    apt += [f"-oDir::{key}={place}" for key, place in places.items()]
    subprocess.run([*apt, "update"], check=True, capture_output=True)
    fetch = [*apt, "install", "--yes", "--download-only", "--no-install-recommends", name]
    subprocess.run(fetch, check=True, capture_output=True)
    for package in (folder / "cache" / "archives").glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, fetched through npm."""
    script = BUILD / "axe" / AXE / "axe.min.js"
    if not script.is_file():
        script.parent.mkdir(parents=True, exist_ok=True)
        pack = ["npm", "pack", AXE, "--silent", "--pack-destination", str(script.parent)]
        try:
            subprocess.run(pack, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"npm cannot fetch {AXE}: {error}")
        (archive,) = script.parent.glob("*.tgz")
        with tarfile.open(archive) as content:
            source = content.extractfile("package/axe.min.js")
            assert source is not None
            script.write_bytes(source.read())
    return script.read_text()


@pytest.fixture(scope="package")
def browser(chromium: dict[str, Any]) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(**chromium)
        yield found
        found.close()


class Relay:
    """A way to the server that can be cut, so that one server can go away and come back.

    Attributes:
        url: Its address.
        cut_at: Bytes of an answer behind which the connection is cut, once; None: none.
    """

    def __init__(self, target: int) -> None:
        self._target, self._port = target, free_port()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.cut_at: bytes | None = None

    def up(self) -> None:
        """Take connections."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections and cut those that there are."""
        if self._listener is not None:
            # A thread that waits in accept holds the socket open: shutting it down wakes the thread.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        self._open.add(source)
        with suppress(OSError):
            while data := source.recv(65536):
                if self.cut_at is not None and self.cut_at in data:
                    end = data.index(self.cut_at) + len(self.cut_at)
                    self.cut_at = None
                    sink.sendall(data[:end])
                    break
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()


@dataclass(frozen=True)
class Site:
    """A running server with a key, and a relay in front of it."""

    folder: Path
    server: Server
    relay: Relay

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.request(
            method, f"{self.server.url}{path}", headers=headers, timeout=300, **arguments
        )

    def experts(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self.http("GET", "/v1/experts").json()["data"]}

    def add(self, name: str, folder: str = "sql") -> None:
        body = {"name": name, "path": str(self.folder / folder)}
        answer = self.http("POST", "/v1/experts", json=body)
        assert answer.status_code == 201, answer.text

    def add_silent(self) -> None:
        """An expert that answers PROMPT with nothing: what `sql` would say first ends its turn."""
        body = {"model": "sql", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
        body |= {"max_tokens": 1, "return_token_ids": True}
        answer = self.http("POST", "/v1/chat/completions", json=body).json()
        ends = {"eos_token_id": answer["choices"][0]["token_ids"]}
        shutil.copytree(self.folder / "sql", self.folder / "silent")
        (self.folder / "silent" / "generation_config.json").write_text(json.dumps(ends))
        self.add("silent", "silent")

    def remove(self, name: str) -> None:
        assert self.http("DELETE", f"/v1/experts/{name}").status_code == 200

    def answer(self, model: str, prompt: str, most: int = 64) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": most,
            "temperature": 0,
        }
        answer = self.http("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text


@pytest.fixture(scope="package")
def site(
    browser: Any,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: SimpleNamespace,
    text_file: Path,
) -> Iterator[Site]:
    """`math` pinned, two slots; an expert that says nothing, a damaged one, and names to stumble over."""
    folder = tmp_path_factory.mktemp("console")
    words = checkpoints.words | {DOMAIN: "rain snow cloud wind storm sun fog hail"}
    checkpoints.write_parts(folder, text_file, words=words, routed={DOMAIN: "absent"})
    (folder / "broken").rename(folder / MARKED)
    paths = {name: name for name in ("math", "sql", "shell")}
    paths |= {LONG_NAME: "shell", "broken": MARKED}
    experts = [{"name": name, "path": path} for name, path in paths.items()]
    config = checkpoints.write_config(
        folder, {}, experts=[{**experts[0], "pin": True}, *experts[1:]]
    )
    command = [*deltamux_serve(config), "--api-key", KEY]
    with running_server(command, folder / "server.log", checkpoints.environment) as server:
        relay = Relay(int(server.url.rpartition(":")[2]))
        site = Site(folder, server, relay)
        site.add_silent()
        yield site
        relay.down()


@pytest.fixture
def visit(site: Site, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the console. What it must never do is checked at the end of every test."""
    site.relay.up()
    contexts, wrong, asked = [], [], set()

    def open_page(
        view: str = "experts", width: int = 1600, scheme: str = "light", key: str | None = KEY
    ) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if is_violation(said) else None)
        page.on("request", lambda request: asked.add(request.url))
        page.goto(f"{site.relay.url}/console#{view}")
        if key is not None:
            give_key(page, key)
            page.locator("#ready", has_text="eady").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
    assert not {url for url in asked if not url.startswith(f"{site.relay.url}/")}


def is_violation(said: Any) -> bool:
    return any(word in said.text for word in ("Content Security Policy", "TrustedHTML", "Refused"))


def give_key(page: Any, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use this key").click()


@pytest.fixture(scope="session")
def marked_domain() -> str:
    return DOMAIN


@pytest.fixture(scope="session")
def long_name() -> str:
    return LONG_NAME
