"""Keys, servers and experts that go away, and what a key may not do."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
Visit = Callable[..., Any]
KEY = "secret"


def give(page: Any, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_the_page_asks_for_the_key_says_that_it_is_wrong_and_takes_the_right_one(
    visit: Visit,
) -> None:
    page = visit(key=None)
    page.get_by_text("This server wants an API key.").wait_for()
    assert page.locator("#ready").inner_text() == "Locked"
    give(page, "wrong")
    page.get_by_text("The server does not take this key.").wait_for()
    give(page, "schlüssel")
    page.get_by_text("A key is one word of plain letters, digits and signs.").wait_for()
    give(page, KEY)
    page.locator("tr", has_text="math").first.wait_for()
    assert page.evaluate("sessionStorage.getItem('deltamux.key')") == KEY
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    page.locator("tr", has_text="math").first.wait_for()
    page.get_by_role("button", name="Change key").click()
    page.get_by_role("button", name="Forget the key").click()
    page.get_by_text("This server wants an API key.").wait_for()
    assert page.evaluate("sessionStorage.getItem('deltamux.key')") is None


def test_a_locked_page_asks_no_more(site: Any, visit: Visit) -> None:
    page = visit(key=None)
    page.get_by_text("This server wants an API key.").wait_for()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(5000)
    assert not asked


def test_a_server_that_goes_away_is_told_and_the_page_recovers(site: Any, visit: Visit) -> None:
    page = visit()
    site.relay.down()
    page.get_by_text("The server cannot be reached. Asking again").wait_for()
    assert page.locator("#ready").inner_text() == "Away"
    # What was seen last stays.
    assert page.locator("table.experts tbody tr").count() == len(site.experts())
    page.get_by_role("button", name="Bring in shell").click()
    page.locator(".notice.error", has_text="The server cannot be reached.").wait_for()
    site.relay.up()
    page.get_by_text("The server is back.").wait_for()
    assert page.locator("#ready").inner_text() == "Ready"
    assert page.locator("#away").inner_text() == ""


def test_a_server_that_hangs_is_away_too(site: Any, visit: Visit) -> None:
    page = visit()
    page.route("**/v1/experts", lambda route: None)
    page.get_by_text("The server did not answer in time. Asking again").wait_for()
    page.unroute_all(behavior="ignoreErrors")
    page.get_by_text("The server is back.").wait_for()


def test_an_expert_that_disappears_leaves_the_table_with_a_notice(site: Any, visit: Visit) -> None:
    site.add("guest")
    page = visit()
    guest = page.locator("tbody tr", has=page.get_by_text("guest", exact=True))
    guest.wait_for()
    # The button that is pressed in the same moment gets the server's words.
    page.route("**/v1/experts", lambda route: None)
    site.remove("guest")
    page.get_by_role("button", name="Pin guest", exact=True).click()
    page.locator(".notice.error", has_text="The expert `guest` does not exist.").wait_for()
    page.unroute_all(behavior="ignoreErrors")
    page.reload()
    page.locator("tbody tr").first.wait_for()
    assert guest.count() == 0


def test_a_key_that_may_only_look_is_told_so(visit: Visit) -> None:
    """The refusal stands in for a server with tenants; the request and the page are real."""
    page = visit()
    body = {"error": {"message": "only an admin key may pin", "type": "PermissionDeniedError"}}
    page.route(
        "**/pin",
        lambda route: route.fulfill(
            status=403, content_type="application/json", body=json.dumps(body)
        ),
    )
    page.get_by_role("button", name="Unpin math").click()
    words = (
        "This key does not allow it: only an admin key may pin (403). Use an administrator's key."
    )
    page.locator(".notice.error", has_text=words).wait_for()


def test_a_server_that_is_not_ready_says_why(site: Any, visit: Visit) -> None:
    page = visit()
    assert site.http("DELETE", "/v1/experts/math/pin").status_code == 200
    for name in ("sql", "shell"):
        site.answer(name, "hello")
    # The configuration wants math in a slot.
    page.get_by_text(
        "The server is not ready: the pinned expert 'math' is not in a slot"
    ).wait_for()
    assert page.locator("#ready").inner_text() == "Not ready"
    assert site.http("POST", "/v1/experts/math/pin").status_code == 200
    page.locator("#ready", has_text="Ready").wait_for()


def test_metrics_that_cannot_be_read_leave_the_rest_alone(visit: Visit) -> None:
    page = visit()
    page.route("**/metrics", lambda route: route.fulfill(status=404, body=""))
    tile = page.locator(".tile", has_text="Tokens a second")
    tile.get_by_text("/metrics cannot be read").wait_for()
    assert page.locator("#ready").inner_text() == "Ready"
    page.goto(f"{page.url.partition('#')[0]}#memory")
    page.get_by_text("/metrics cannot be read: The server answered with status 404").wait_for()
