"""The playground: four answers at one time, and everything that can go wrong with one of them."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.console.conftest import PROMPT

pytestmark = pytest.mark.vllm
Visit = Callable[..., Any]


def answer(page: Any, which: str) -> Any:
    return page.get_by_role("region", name=f"Answer of {which}")


def column(page: Any, which: str) -> Any:
    return page.locator("#view-playground article", has=answer(page, which))


def choose(page: Any, first: str, second: str) -> None:
    page.get_by_label("Expert 1", exact=True).select_option(first)
    page.get_by_label("Expert 2", exact=True).select_option(second)


def ask(page: Any, prompt: str = PROMPT, most: int = 64) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Max tokens").fill(str(most))
    page.get_by_role("button", name="Ask all four").click()


def ended(page: Any) -> None:
    page.locator("button.primary:not([aria-disabled])", has_text="Ask all four").wait_for()


def test_one_prompt_is_streamed_to_base_auto_and_two_experts(site: Any, visit: Visit) -> None:
    page = visit("playground")
    choose(page, "math", "shell")
    ask(page)
    ended(page)
    models = {"base": "tiny", "auto": "auto", "expert 1": "math", "expert 2": "shell"}
    for which, model in models.items():
        text = answer(page, which).text_content()
        assert text == site.answer(model, PROMPT)
        # A piece is added for each event, so many pieces came as many events.
        assert answer(page, which).evaluate("node => node.childNodes.length") > 1
        assert "first token after" in column(page, which).locator(".detail").inner_text()
    who = {which: column(page, which).locator(".who").inner_text() for which in models}
    assert who["base"] == "answered by base"
    assert who["expert 1"] == "answered by math"
    assert who["auto"].startswith("answered by sql: the router is sure, ")


def test_a_raw_prompt_goes_without_the_chat_template(site: Any, visit: Visit) -> None:
    page = visit("playground")
    page.get_by_label("Use the chat template").uncheck()
    ask(page)
    ended(page)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    raw = site.http("POST", "/v1/completions", json=body).json()["choices"][0]["text"]
    assert answer(page, "base").text_content() == raw


def test_a_model_that_streams_nothing_is_told_from_one_that_waits(visit: Visit) -> None:
    page = visit("playground")
    choose(page, "silent", "math")
    ask(page)
    ended(page)
    said = answer(page, "expert 1").inner_text()
    assert said == "The model answered with nothing: it ended at once (ended by itself)."
    assert answer(page, "expert 2").inner_text() != ""


def test_a_refusal_of_the_server_stands_in_the_column(visit: Visit) -> None:
    page = visit("playground")
    ask(page, prompt="x" * 2000)
    ended(page)
    for which in ("base", "auto", "expert 1", "expert 2"):
        assert "maximum context length" in answer(page, which).inner_text()


def test_an_expert_that_is_gone_is_answered_by_the_servers_words(site: Any, visit: Visit) -> None:
    site.add("guest")
    page = visit("playground")
    choose(page, "guest", "math")
    # The page learns of it at its next look; the request may come before that.
    page.route("**/v1/experts", lambda route: None)
    site.remove("guest")
    ask(page)
    ended(page)
    assert "guest" in answer(page, "expert 1").inner_text()
    assert "does not exist" in answer(page, "expert 1").inner_text()
    assert answer(page, "expert 2").inner_text() != ""
    page.unroute_all(behavior="ignoreErrors")


def test_a_connection_that_breaks_is_told_and_the_others_go_on(site: Any, visit: Visit) -> None:
    page = visit("playground")
    choose(page, "math", "shell")
    site.relay.cut_at = b'"object":"chat.completion.chunk"'
    ask(page)
    ended(page)
    whole = [column(page, which).inner_text() for which in ("base", "auto", "expert 1", "expert 2")]
    assert sum("The connection broke before the answer had ended." in text for text in whole) == 1


def test_stop_ends_every_answer(site: Any, visit: Visit, eventually: Callable[..., Any]) -> None:
    page = visit("playground")
    # Held back, the requests are open for as long as it takes to press the button.
    page.route("**/v1/chat/completions", lambda route: None)
    ask(page)
    eventually(lambda: page.get_by_text("Waiting for the first token").count() == 4)
    page.get_by_role("button", name="Stop").click()
    ended(page)
    assert page.locator(".answer", has_text="Stopped.").count() == 4
    page.unroute_all(behavior="ignoreErrors")


def test_what_was_chosen_stays_chosen_until_it_is_gone(site: Any, visit: Visit) -> None:
    site.add("guest")
    page = visit("playground")
    choose(page, "guest", "shell")
    site.add("later")
    page.get_by_text("later is on offer now.").wait_for()
    first = page.get_by_label("Expert 1", exact=True)
    assert first.input_value() == "guest"
    site.remove("guest")
    page.get_by_text("guest is no longer on offer.").first.wait_for()
    assert first.input_value() != "guest"
    assert answer(page, "expert 1").inner_text() == "guest is no longer on offer."
    assert page.get_by_label("Expert 2", exact=True).input_value() == "shell"
    site.remove("later")
