"""For everybody: axe-core's findings, both widths, both schemes, and the keyboard alone."""

import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
Visit = Callable[..., Any]
VIEWS = ("experts", "playground", "bench", "router", "memory")


def go_to(page: Any, view: str) -> None:
    page.goto(f"{page.url.partition('#')[0]}#{view}")
    page.locator(f"#view-{view} h1").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_axe_finds_nothing_serious(visit: Visit, axe: str, width: int, scheme: str) -> None:
    page = visit(width=width, scheme=scheme)
    page.evaluate(axe)
    for view in VIEWS:
        go_to(page, view)
        if view == "bench":
            page.get_by_role("button", name="Route", exact=True).click()
            page.get_by_text("routed in").wait_for()
        if view == "playground":
            page.get_by_role("button", name="Ask all four").click()
            page.locator("#view-playground .detail", has_text="first token").first.wait_for()
        assert serious(page) == [], (view, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (
            view,
            width,
        )
    page.get_by_role("button", name="Change key").click()
    assert serious(page) == []


def serious(page: Any) -> list[str]:
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [
        f"{each['id']}: {node['html']} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def test_axe_would_find_a_serious_fault(visit: Visit, axe: str) -> None:
    page = visit()
    page.evaluate(axe)
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    assert any(each.startswith("button-name") for each in serious(page))


def test_the_two_schemes_differ(visit: Visit) -> None:
    grounds = {
        visit(scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    }
    assert len(grounds) == 2


def focused(page: Any) -> str:
    name: str = page.evaluate(
        "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
    )
    return name.strip()


def press_until(page: Any, wanted: str, most: int = 60) -> None:
    for _ in range(most):
        page.keyboard.press("Tab")
        if focused(page) == wanted:
            return
    raise AssertionError(f"{wanted!r} was not reached by {most} presses of Tab")


def test_everything_is_reached_by_keyboard_alone(site: Any, visit: Visit) -> None:
    page = visit(key=None)
    page.get_by_text("This server wants an API key.").wait_for()
    # The dialog has the focus when it opens.
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.locator("#ready", has_text="eady").wait_for()
    press_until(page, "Skip to the content")
    press_until(page, "Routing bench")
    page.keyboard.press("Enter")
    page.wait_for_function("document.title === 'Routing bench · deltamux'")
    assert focused(page) == "Routing bench"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("select the column of rows")
    press_until(page, "Route")
    page.keyboard.press("Space")
    page.get_by_text("1 routed in").wait_for()
    page.go_back()
    page.locator("#view-experts").wait_for()
    site.http("POST", "/v1/experts/shell/slot")
    page.locator('button[aria-label="Bring in sql"]:not([aria-disabled])').wait_for()
    press_until(page, "Bring in sql")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile("sql is in slot")).wait_for()


def test_a_look_at_the_server_takes_neither_focus_nor_what_is_typed(
    site: Any, visit: Visit
) -> None:
    page = visit()
    page.get_by_label("Find an expert").fill("sql")
    page.get_by_role("button", name="Pin sql", exact=True).focus()
    with page.expect_response("**/metrics"), page.expect_response("**/v1/experts"):
        pass
    site.answer("sql", "hello")
    page.locator("tr", has_text="sql").get_by_text(re.compile("now|s ago")).wait_for()
    assert focused(page) == "Pin sql"
    assert page.get_by_label("Find an expert").input_value() == "sql"
