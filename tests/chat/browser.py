"""The chat's page in a headless Chromium: a server of it, a browser, and what a person does there."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest

from tests.chat.terminal import REPO

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
TIMEOUT_MS = 120_000  # generous: the machine is shared
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None or find_spec("gradio") is None,
    reason="needs Chromium (apt-get install chromium), playwright and gradio",
)


@dataclass
class Web:
    """lines: what the server writes after its address, as it comes."""

    url: str
    lines: Iterator[str]


@contextmanager
def web(*command: str) -> Iterator[Web]:
    """What this command serves."""
    server = subprocess.Popen([sys.executable, *command], cwd=REPO, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        lines = iter(server.stderr.readline, "")
        said: list[str] = []
        url = next(
            (found[1] for line in lines if (said.append(line) or (found := re.search("page is at (.*)", line)))), None
        )
        assert url, "".join(said)
        yield Web(url, lines)
    finally:
        server.terminate()
        server.wait(TIMEOUT_MS / 1000)
        server.stderr.close()


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=TIMEOUT_MS
        )
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, url: str) -> Iterator[Any]:
    """A page for somebody new. Whatever it wants from elsewhere fails the test."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    elsewhere: list[str] = []
    page.route(
        lambda address: not address.startswith(url),
        lambda route: (elsewhere.append(route.request.url), route.abort()),
    )
    page.goto(url)
    page.locator("#question textarea").wait_for()
    yield page
    context.close()
    assert elsewhere == []


def ask(page: Any, question: str) -> None:
    """Send can be clicked when the answer before is over."""
    page.locator("#question textarea").fill(question)
    page.locator("#send").click()


def wait_for(page: Any, where: str, text: str) -> None:
    page.locator(where).filter(has_text=text).first.wait_for()


def wait_for_status(page: Any, text: str) -> str:
    page.wait_for_function(
        "text => document.querySelector('#status textarea, #status input').value.includes(text)", arg=text
    )
    return str(page.locator("#status textarea, #status input").input_value())
