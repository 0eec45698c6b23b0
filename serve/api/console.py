"""`GET /console`: the page that shows the server to people, and the files that it loads.

The files hold nothing of the server, so they are outside `/v1` and want no key: a browser cannot send one
when it opens a page. What the page shows it asks of the routes that programs use, with the key that its
reader gives it. Nothing runs here while nobody looks.
"""

from http import HTTPStatus
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse, Response

FOLDER: Final = Path(__file__).parent.parent / "console"
PAGE: Final = "index.html"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {
    # Scripts and styles from this server's files alone; no other host is asked for anything.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for anew each time, so that page and server are of one version.
    "Cache-Control": "no-cache",
}

console_router = APIRouter(include_in_schema=False)


@console_router.get("/console")
async def page() -> Response:
    """The page."""
    return _file(PAGE)


@console_router.get("/console/{name}")
async def part(name: str) -> Response:
    """A script or a style of the page."""
    return _file(name)


@console_router.get("/console/")
async def page_with_slash() -> Response:
    """The page's files are named relative to `/console`, also behind a proxy's prefix."""
    return RedirectResponse("../console", HTTPStatus.PERMANENT_REDIRECT.value)


def _file(name: str) -> Response:
    # The name is one of those in the folder, never a path that a client made up.
    path = next((each for each in FOLDER.iterdir() if each.name == name), None)
    kind = TYPES.get(path.suffix) if path else None
    if path is None or kind is None:
        return Response(status_code=HTTPStatus.NOT_FOUND.value, headers=HEADERS)
    return FileResponse(path, media_type=kind, headers=HEADERS)
