"""Photograph the console of a running server: every view, both widths, both schemes.

    deltamux serve .demo/deltamux.yaml --port 8000
    python docker/tools/console.py http://127.0.0.1:8000 --minutes 4

The server is asked for some minutes first, so that there is something to see. Needs playwright, Debian's
chromium and Pillow; the pictures look best where the font Inter is installed (fonts-inter).
"""

import argparse
import io
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

DOCKER = Path(__file__).parent.parent
# The playground comes last: its answers are to be measured without other traffic.
VIEWS = ("experts", "router", "memory", "bench", "playground")
WIDTHS = (360, 1600)
SCHEMES = ("light", "dark")
# Enough for flat colours and smoothed letters, in a third of the bytes.
COLOURS = 256
PROMPTS = (
    "What is 17 times 23?",
    "List the names of all customers who ordered in May.",
    "Find all files larger than 10 MB in my home directory.",
    "What is a good name for a cat?",
    "Tom has 4 boxes with 12 apples each. How many apples does he have?",
)
# How many requests are open at one time, by turns: a course that goes up and down.
CROWDS = (1, 3, 2, 0, 4, 2)
TURN_SECONDS = 12


class Traffic:
    """Clients of every model.

    Args:
        url: The server's address.
        headers: With its key, if it wants one.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._url, self._headers = url, headers
        self._end = threading.Event()
        listed = httpx.get(f"{url}/v1/models", headers=headers).raise_for_status().json()["data"]
        self._models = [each["id"] for each in listed]
        self._start = time.monotonic()
        for number in range(max(CROWDS)):
            threading.Thread(target=self._ask, args=(number,), daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._end.set()

    def _ask(self, number: int) -> None:
        turn = number
        while not self._end.is_set():
            now = int((time.monotonic() - self._start) / TURN_SECONDS)
            if number >= CROWDS[now % len(CROWDS)]:
                time.sleep(0.5)
                continue
            turn += 1
            # Two experts at a time, and then others: what is in the slots changes now and then.
            model = "auto" if turn % 3 else self._models[(now // 2 + number) % len(self._models)]
            body = {
                "model": model,
                "messages": [{"role": "user", "content": PROMPTS[(now + turn) % len(PROMPTS)]}],
                "max_tokens": 48,
            }
            url = f"{self._url}/v1/chat/completions"
            httpx.post(url, json=body, headers=self._headers, timeout=300).raise_for_status()


def open_console(browser: Browser, url: str, key: str, width: int, scheme: str) -> Page:
    """A page that looks at the server."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(f"{url}/console")
    if key:
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Use this key").click()
    page.locator("table.experts tbody tr").first.wait_for()
    return page


def use(page: Page, view: str) -> None:
    """Go to a view and let it show what it is for."""
    page.goto(f"{page.url.partition('#')[0]}#{view}")
    if view == "playground":
        page.get_by_role("button", name="Ask all four").click()
        page.locator("button.primary[aria-disabled]").first.wait_for()
        page.locator("#view-playground button.primary:not([aria-disabled])").wait_for(
            timeout=300_000
        )
    elif view == "bench":
        page.get_by_role("button", name="Route", exact=True).click()
        page.get_by_text("routed in").wait_for()
    elif view == "router":
        page.locator(".mix li").first.wait_for()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")


def save(page: Page, path: Path) -> None:
    """Photograph the whole page, in few colours."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the server's address")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--minutes", type=float, default=4, help="of traffic before the pictures")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path, default=DOCKER / "preview")
    arguments = parser.parse_args()
    headers = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else {}
    arguments.output.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        options: dict[str, Any] = {"args": ["--no-sandbox"], "executable_path": arguments.chromium}
        browser = driver.chromium.launch(**options)
        asked = (arguments.url, arguments.key)
        pages = {
            (width, scheme): open_console(browser, *asked, width, scheme)
            for width in WIDTHS
            for scheme in SCHEMES
        }
        traffic = Traffic(arguments.url, headers)
        next(iter(pages.values())).wait_for_timeout(60_000 * arguments.minutes)
        for view in VIEWS:
            if view == "playground":
                traffic.stop()
            for (width, scheme), page in pages.items():
                use(page, view)
                save(page, arguments.output / f"console-{view}-{width}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
