"""Every view, against what the server's own routes say."""

import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
Visit = Callable[..., Any]


def row(page: Any, name: str) -> Any:
    return page.locator("table.experts tbody tr", has=page.get_by_text(name, exact=True))


def cell(page: Any, name: str, label: str) -> Any:
    return row(page, name).locator(f'td[data-label="{label}"]')


def test_the_table_says_what_the_route_says(site: Any, visit: Visit) -> None:
    site.answer("sql", "hello")
    page = visit()
    for name, expert in site.experts().items():
        where = cell(page, name, "Where").inner_text()
        if expert["error"]:
            assert where == "refused"
            continue
        assert expert["tier"] in where
        assert where.endswith(", pinned") == expert["pinned"]
        assert cell(page, name, "Size").inner_text() == f"{expert['bytes'] / 1e3:.1f} kB"
        bits = f"{expert['bits_per_weight']:.2f} disk, {expert['slot_bits_per_weight']:.2f} slot"
        assert cell(page, name, "Bits a weight").inner_text() == bits
    assert (
        "now" in cell(page, "sql", "Last asked").inner_text()
        or "ago" in cell(page, "sql", "Last asked").inner_text()
    )


def test_the_slots_show_who_is_in_them(site: Any, visit: Visit) -> None:
    site.answer("sql", "hello")
    page = visit()
    slots = page.get_by_role("list", name="Slots").get_by_role("listitem")
    assert slots.count() == 2
    held = {each["slot"]: name for name, each in site.experts().items() if each["slot"] is not None}
    for number, name in held.items():
        assert name in slots.nth(number).inner_text()


def test_requests_and_tokens_a_second_rise_with_requests(site: Any, visit: Visit) -> None:
    page = visit()
    tokens = cell(page, "sql", "Tokens/s")
    assert tokens.inner_text() == "0"
    site.answer("sql", "hello")
    page.wait_for_function("cell => cell.textContent !== '0'", arg=tokens.element_handle())
    assert cell(page, "sql", "Requests/s").inner_text() != "0"
    assert cell(page, "shell", "Tokens/s").inner_text() == "0"
    assert page.locator(".tile", has_text="Tokens a second").locator("strong").inner_text() != "0"


def test_an_expert_is_brought_in_pinned_and_let_go_by_hand(
    site: Any, visit: Visit, eventually: Callable[..., Any]
) -> None:
    page = visit()
    assert site.http("DELETE", "/v1/experts/math/pin").json()["pinned"] is False
    for name in ("sql", "shell"):
        site.answer(name, "hello")
    page.get_by_role("button", name="Bring in math").click()
    page.get_by_text("math is in slot").wait_for()
    assert site.experts()["math"]["tier"] == "slot"
    # Two slots: the one that was asked least recently made room.
    assert site.experts()["sql"]["tier"] == "host"
    assert not site.experts()["math"]["pinned"]
    page.get_by_role("button", name="Pin math", exact=True).click()
    page.get_by_text("math keeps its slot").wait_for()
    assert site.experts()["math"]["pinned"]
    # One slot must stay free of pins.
    page.get_by_role("button", name="Pin shell", exact=True).click()
    page.locator(".notice.error", has_text="one must stay free").wait_for()
    page.get_by_role("button", name="Unpin math").click()
    page.get_by_text("math may leave its slot").wait_for()
    assert not site.experts()["math"]["pinned"]
    assert site.experts()["math"]["tier"] == "slot"
    spans = row(page, "sql").locator("rect.where-host")
    eventually(lambda: spans.count() >= 1)
    assert "host for" in (row(page, "sql").locator("svg").get_attribute("aria-label") or "")
    assert site.http("POST", "/v1/experts/math/pin").json()["pinned"]


def test_a_refused_expert_shows_its_reason_and_can_be_tried_again(site: Any, visit: Visit) -> None:
    page = visit()
    reason = site.experts()["broken"]["error"]
    # The reason names the directory, which holds marks of markup.
    assert "<i>&lt;damaged" in reason
    assert row(page, "broken").locator(".reason").inner_text() == reason
    page.get_by_role("button", name="Try again to load broken").click()
    page.locator(".notice.error", has_text="truncated or damaged").wait_for()
    assert row(page, "broken").get_by_role("button").count() == 1


def test_the_timeline_outlives_a_reload(site: Any, visit: Visit, eventually: Visit) -> None:
    page = visit()
    eventually(lambda: row(page, "math").locator("rect").count() >= 1)
    started = row(page, "math").locator("rect").first.get_attribute("data-key")
    page.reload()
    eventually(lambda: row(page, "math").locator("rect").count() >= 1)
    assert row(page, "math").locator("rect").first.get_attribute("data-key") == started


def test_two_hundred_experts_are_listed_found_and_sorted(site: Any, visit: Visit) -> None:
    names = [f"crowd-{number:03}" for number in range(200 - len(site.experts()))]
    for name in names:
        site.add(name)
    try:
        page = visit()
        rows = page.locator("table.experts tbody tr")
        page.wait_for_function("document.querySelectorAll('table.experts tbody tr').length === 200")
        page.locator("button.sort", has_text="Expert").click()
        assert rows.first.locator("strong").inner_text() == min(site.experts())
        page.locator("button.sort", has_text="Expert").click()
        assert rows.first.locator("strong").inner_text() == max(site.experts())
        page.get_by_label("Find an expert").fill("CROWD-01")
        assert rows.count() == 10
        assert page.get_by_text("10 of 200 experts").is_visible()
        page.get_by_label("Where they are").select_option("refused")
        assert page.get_by_text("No expert is called like that, there.").is_visible()
        page.get_by_label("Find an expert").fill("")
        assert rows.count() == 1
        narrow = visit(width=360)
        assert overflow(narrow) == 0
        assert narrow.locator("table.experts tbody tr").count() == 200
    finally:
        for name in names:
            site.remove(name)


def test_the_routing_bench_shows_probabilities_and_deciding_tokens(site: Any, visit: Visit) -> None:
    page = visit("bench")
    prompts = ["select the column where rows join", "snow and wind and rain"]
    page.get_by_label("Prompts, one a line").fill("\n\n".join(prompts))
    page.get_by_role("button", name="Route", exact=True).click()
    page.get_by_text("2 routed in").wait_for()
    items = page.get_by_role("list", name="Decisions").locator("> li")
    for index, prompt in enumerate(prompts):
        said = site.http("POST", "/v1/route", json={"prompt": prompt, "explain": True}).json()
        item = items.nth(index)
        assert item.locator(".prompt").inner_text() == prompt
        assert item.locator(".verdict strong").inner_text() == (said["expert"] or "base")
        ranked = sorted(said["probabilities"].items(), key=lambda pair: -pair[1])
        assert item.locator(".domains .domain").all_inner_texts() == [name for name, _ in ranked]
        needed = item.locator(".domains li").first.locator(".needs").inner_text()
        threshold = said["explanation"]["thresholds"].get(ranked[0][0])
        assert needed == ("" if threshold is None else f"{100 * threshold:.0f} % needed")
        tokens = [each["text"].replace(" ", "·") for each in said["explanation"]["tokens"]]
        assert item.locator(".chips code").all_inner_texts() == tokens


def test_a_domain_of_markup_is_shown_as_text(site: Any, visit: Visit, marked_domain: str) -> None:
    page = visit("bench")
    page.get_by_label("Prompts, one a line").fill("snow wind storm fog")
    page.get_by_role("button", name="Route", exact=True).click()
    page.get_by_text("1 routed in").wait_for()
    assert marked_domain in page.locator(".domains .domain").all_inner_texts()
    page.goto(f"{site.relay.url}/console#router")
    page.locator(".mix .domain", has_text="<img src=x").wait_for()
    # Its expert is not served.
    assert "absent" in page.locator("#view-router .reason").inner_text()
    assert page.locator("main img").count() == 0
    assert page.title() == "Router · deltamux"


def test_the_router_view_sets_the_mix_beside_that_of_the_fit(site: Any, visit: Visit) -> None:
    page = visit("router")
    page.get_by_role("button", name="Load the router again").click()
    page.get_by_text("The router was loaded again").wait_for()
    tiles = page.locator("#view-router .tile")
    assert tiles.locator("strong").all_inner_texts() == ["–", "–", "–", "0"]
    site.http(
        "POST", "/v1/completions", json={"model": "auto", "prompt": "select", "max_tokens": 1}
    )
    tiles.filter(has_text="Decisions looked at").get_by_text("1", exact=True).wait_for()
    router = site.http("GET", "/v1/router").json()
    distance = f"{router['drift']['mix_distance']:.2f}"
    assert tiles.filter(has_text="Distance").locator("strong").inner_text() == distance
    for item in page.locator(".mix li").all():
        name = item.locator(".domain").inner_text()
        now, fit = (item.locator(".share").nth(place).inner_text() for place in (0, 1))
        assert now == f"{100 * router['drift']['mix'][name]:.0f} %"
        assert fit == f"{100 * router['drift']['fit_mix'][name]:.0f} %"


def test_the_memory_view_names_every_kind(site: Any, visit: Visit) -> None:
    page = visit("memory")
    kinds = re.findall(
        r'^deltamux_memory_bytes\{kind="(\w+)"\}', site.http("GET", "/metrics").text, re.M
    )
    shown = page.locator("table.kinds tbody th").all_inner_texts()
    assert sorted(shown) == sorted(kind.replace("_", " ") for kind in kinds)
    assert (
        page.locator("table.kinds tbody tr", has_text="kv cache")
        .get_by_text("67.1 MB")
        .is_visible()
    )
    assert re.fullmatch(r".+ of .+ in use, .+ %", page.locator(".places .detail").inner_text())
    assert page.locator(".stack .part").count() == len(kinds)


def test_a_long_name_breaks_and_never_widens_the_page(visit: Visit, long_name: str) -> None:
    for width in (360, 1600):
        page = visit(width=width)
        assert row(page, long_name).locator("strong").inner_text() == long_name
        for view in ("experts", "playground", "bench", "router", "memory"):
            page.goto(f"{page.url.partition('#')[0]}#{view}")
            page.locator(f"#view-{view}").wait_for()
            if view == "playground":
                page.get_by_label("Expert 1", exact=True).select_option(long_name)
            assert overflow(page) == 0, (view, width)


def overflow(page: Any) -> int:
    found: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return max(found, 0)
