"""The page as files: who gets them, with which headers, how large they are."""

import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serve" / "console"
FILES = sorted(path.name for path in FOLDER.iterdir())
# Everything that a first visit loads, uncompressed.
MOST_BYTES = 150_000
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def client() -> TestClient:
    from deltamux.serve.api.console import console_router

    app = FastAPI()
    app.include_router(console_router)
    return TestClient(app, follow_redirects=False)


def policy(answer: httpx.Response) -> dict[str, str]:
    parts = answer.headers["content-security-policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


@pytest.mark.parametrize("path", ["/console", *(f"/console/{name}" for name in FILES)])
def test_a_file_comes_with_a_strict_policy(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    found = policy(answer)
    assert found["default-src"] == "'none'"
    assert {found[kind] for kind in ("script-src", "style-src", "connect-src", "img-src")} == {
        "'self'"
    }
    assert found["frame-ancestors"] == found["base-uri"] == found["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["..%2fendpoint.py", "%2fetc%2fpasswd", "nothing.js", "app.py"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/console/{name}").status_code == 404


def test_the_address_with_a_slash_leads_to_the_page(client: TestClient) -> None:
    answer = client.get("/console/")
    assert (answer.status_code, answer.headers["location"]) == (308, "../console")


def test_the_page_stays_small(client: TestClient) -> None:
    assert sum(len(client.get(f"/console/{name}").content) for name in FILES) <= MOST_BYTES


def test_the_page_has_no_inline_script_or_style_and_names_no_other_host() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)
    named = {
        url for name in FILES for url in re.findall(r"\w+://[^\s\"']+", (FOLDER / name).read_text())
    }
    # The name of SVG's elements, which is no address to ask.
    assert named == {"http://www.w3.org/2000/svg"}


def test_no_script_makes_markup_or_code_of_text() -> None:
    makers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setHTML"
    assert not [name for name in FILES if re.search(makers, (FOLDER / name).read_text())]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.js")), ids=lambda path: path.name)
def test_a_script_is_short_and_so_are_its_functions(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    starts = [i for i, line in enumerate(lines) if re.match(r"(export )?(async )?function", line)]
    ends = [next(i for i in range(start, len(lines)) if lines[i] == "}") for start in starts]
    assert max((end - start + 1 for start, end in zip(starts, ends, strict=True)), default=0) <= 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("view", ["experts", "playground", "bench", "router", "memory"])
def test_every_view_has_its_picture(view: str, width: int, scheme: str) -> None:
    picture = ROOT / "docker" / "preview" / f"console-{view}-{width}-{scheme}.png"
    content = picture.read_bytes()
    assert int.from_bytes(content[16:20], "big") == width
    assert len(content) < MOST_BYTES
