"""The explorer's page in a browser."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.web.browser import chromium, open_page
from tests.web.conftest import HOSTILE
from topk_megatron.web.explorer.engine import Engine

PROMPT = f"word5 word9 {HOSTILE} word70"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, a prompt read."""
    with open_page(browser, address) as opened:
        opened.wait_for_selector("html[data-ready=yes]")
        opened.fill("#prompt", PROMPT)
        opened.click("#read")
        opened.locator("#neurons .layer").first.wait_for()
        yield opened


def test_prompt_to_token_to_neuron_to_card(page: Any) -> None:
    tokens = page.locator("#tokens button")
    assert tokens.count() == 4
    assert HOSTILE in tokens.nth(2).inner_text()
    tokens.nth(1).click()
    assert tokens.nth(1).get_attribute("aria-pressed") == "true"
    # In the invented study the last neuron never fires.
    first = page.locator("#neurons button[data-layer='0']:not([data-neuron='31'])").first
    name = first.get_attribute("data-neuron")
    first.click()
    page.locator(f"#card[data-neuron='0:{name}'] .examples").wait_for()
    text = page.locator("#card").inner_text()
    assert "Strongest examples" in text
    assert "Promoted" in text
    assert "Layer 0" in page.locator("#card h2").inner_text()
    assert f"neuron {name} at layer 0" in page.locator("#tokens-legend").inner_text()
    assert page.locator("main script, main i").count() == 0
    assert page.evaluate("window.hacked === undefined")


def test_layer_without_a_card_says_so(page: Any) -> None:
    page.locator("#neurons button[data-layer='1']").first.click()
    page.get_by_text("The study did not record this layer.").wait_for()


def test_slider_steers_next_to_the_unsteered_text(page: Any) -> None:
    page.locator("#neurons button[data-layer='1']").first.click()
    slider = page.locator("#strength")
    slider.wait_for()
    slider.focus()
    page.keyboard.press("End")
    columns = page.locator("#continuations > div")
    columns.nth(1).wait_for()
    assert "4.0 (value" in page.locator("#strength-shown").inner_text()
    assert columns.nth(0).inner_text() != columns.nth(1).inner_text()
    page.get_by_text("They differ after").wait_for()
    slider.fill("0")
    page.get_by_text("Both are the same.").wait_for()


def test_errors_are_sentences_on_the_page(
    page: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.fill("#prompt", "")
    page.click("#read")
    page.get_by_text("Type a prompt first").wait_for()
    page.fill("#prompt", "word5 " * 40)
    page.keyboard.press("Control+Enter")
    page.get_by_text("The prompt has 40 tokens; 1 to 31 can be read").wait_for()
    page.locator("#neurons button").first.click()
    page.fill("#new-tokens", "29")
    page.click("#generate")
    page.locator("#steer-error", has_text="when 29 are to be generated").wait_for()
    page.route("**/api/steer", lambda route: route.abort())
    page.fill("#new-tokens", "5")
    page.click("#generate")
    page.get_by_text("The server does not answer").wait_for()


def test_keyboard_alone_reaches_a_neuron_by_number(page: Any) -> None:
    page.locator("#goto-neuron").focus()
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    page.locator("#card[data-neuron='0:3'], #card[data-neuron='0:30']").wait_for()


def test_narrow_screen_does_not_scroll_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#neurons button[data-layer='0']:not([data-neuron='31'])").first.click()
    page.locator("#card .examples").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
