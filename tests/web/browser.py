"""Starts headless Chromium for tests of pages: Debian's, not Playwright's own build."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """Yields a running browser; without one on PATH, the test is skipped with the reason."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on PATH (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """Yields a page at desktop width; an error in any of its scripts fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(20_000)
    page.goto(url)
    try:
        yield page
    finally:
        page.close()
    assert not errors


def wait_until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Waits until a JavaScript expression is true.

    Playwright's own `wait_for_function` evaluates text inside the page, which its content security
    policy refuses.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true after {seconds:g} s: {expression}"
        page.wait_for_timeout(50)
