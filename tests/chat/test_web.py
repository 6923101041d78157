"""The chat's page in a headless Chromium that types and reads; what needs no browser first."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

from lmtool.chat.session import Session, Turn
from lmtool.chat.web_book import Answering, Book, answer_shown, sampling, shown
from lmtool.config import GenerationConfig
from lmtool.errors import InputError, RequestError
from tests.chat.fake_chat import FakeBackend
from tests.chat.terminal import REPO
from tests.server.serving import Serving

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
TIMEOUT_MS = 120_000  # generous: the machine is shared
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None or find_spec("gradio") is None,
    reason="needs Chromium (apt-get install chromium), playwright and gradio",
)


# ------------------------------------------------------------------ conversations
def test_conversations_are_begun_chosen_and_deleted() -> None:
    book = Book()
    book.session.system = "Be brief."
    book.session.turns.append(Turn("a first question that is much longer than any title should be", "yes"))
    book.begin()
    assert (book.session.turns, book.session.system) == ([], "Be brief.")
    assert [number for _, number in book.titles()] == [2, 1]
    assert book.titles()[0][0] == "2: new conversation"
    assert len(book.titles()[1][0]) < 50
    book.choose(1)
    assert book.session.turns[0].assistant == "yes"
    with pytest.raises(InputError):
        book.choose(7)
    book.delete()
    assert book.current == 2
    book.delete()
    assert (len(book.sessions), book.session.turns) == (1, [])


def test_a_thought_is_shown_apart() -> None:
    session = Session(turns=[Turn("why", "<think>\nso\n</think>\n\nbecause")])
    thought, answer = shown(session)[1:]
    assert (thought["content"], thought["metadata"]) == ("so\n", {"title": "Thought"})
    assert answer == {"role": "assistant", "content": "because"}
    assert [message["content"] for message in answer_shown("so</think>yes", inside=True)] == ["so", "yes"]


def test_a_turn_that_is_stopped_is_kept_as_far_as_it_came() -> None:
    session = Session()
    turn = Answering(FakeBackend(100), session, "endless", GenerationConfig())
    for text in turn:
        if "word3" in text:
            turn.abort()
    assert turn.keep()
    assert session.turns[0].partial
    assert session.turns[0].assistant.startswith("word0 word1 word2 word3")
    assert "stopped" in turn.summary()


def test_fields_of_the_page_are_checked() -> None:
    defaults = GenerationConfig(top_k=5)
    assert sampling(defaults, 1, 0.5, None) == GenerationConfig(top_k=5, temperature=1.0, top_p=0.5)
    with pytest.raises(RequestError):
        sampling(defaults, -1, 0.5, 10)


# ------------------------------------------------------------------ the command
def lmtool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmtool", "serve", "gradio", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("http://127.0.0.1:1",), "nothing listens at http://127.0.0.1:1; start the server"),
        (("http://127.0.0.1:1", "--share"), "--share would lead everything through gradio's own servers"),
        (("http://127.0.0.1:1", "--share", "True"), "--share would lead"),
        (("http://127.0.0.1:1", "--session-len", "100"), "--session-len is for a model that is loaded here"),
        (("smollm2-135m", "--restful_api", "True"), "--restful-api is for a server"),
        (("smollm2-135m", "--api-key", "k"), "--api-key is for a server"),
        (("http://127.0.0.1:1", "--tp", "1"), "--tp is for a model that is loaded here"),
        (("http://127.0.0.1:1", "--server-name", "192.0.2.1"), "192.0.2.1:6006 cannot be listened at"),
        (("http://127.0.0.1:1", "--top-p", "7"), "--top-p is 7"),
    ],
)
def test_what_cannot_be_is_one_line(words, said) -> None:
    found = lmtool(*words)
    assert found.returncode == 2
    assert said in found.stderr
    assert found.stderr.count("\n") == 1


# ------------------------------------------------------------------ the browser
@contextmanager
def page_of(*command: str) -> Iterator[Any]:
    """A browser's page of what this command serves."""
    with page_and_lines_of(*command) as (page, _):
        yield page


@contextmanager
def page_and_lines_of(*command: str) -> Iterator[tuple[Any, Iterator[str]]]:
    """And what the command writes. Whatever the page wants from elsewhere fails the test."""
    from playwright.sync_api import sync_playwright

    server = subprocess.Popen([sys.executable, *command], cwd=REPO, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, "")
        said: list[str] = []
        url = next(
            (found[1] for line in lines if (said.append(line) or (found := re.search("page is at (.*)", line)))), None
        )
        assert url, "".join(said)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.set_default_timeout(TIMEOUT_MS)
            elsewhere: list[str] = []
            page.route(
                lambda address: not address.startswith(url),
                lambda route: (elsewhere.append(route.request.url), route.abort()),
            )
            page.goto(url)
            page.locator("#question textarea").wait_for()
            yield page, lines
            browser.close()
            assert elsewhere == []
    finally:
        server.terminate()
        server.wait(60)
        server.stderr.close()


def ask(page: Any, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#send").click()


def wait_for(page: Any, where: str, text: str) -> None:
    page.locator(where).filter(has_text=text).first.wait_for()


def wait_for_status(page: Any, text: str) -> str:
    page.wait_for_function(
        "text => document.querySelector('#status textarea, #status input').value.includes(text)", arg=text
    )
    return page.locator("#status textarea, #status input").input_value()


@in_a_browser
def test_a_person_chats_in_a_browser() -> None:
    with page_of("-m", "tests.chat.fake_web") as page:
        page.locator("#system textarea").fill("Be brief.")
        ask(page, "hello")
        wait_for(page, "#chat", "answer 1 to 'hello' in 1 lines at 0.5")
        assert "prompt tokens" in wait_for_status(page, "generated")
        assert page.locator("#question textarea").input_value() == ""
        # Markdown is drawn, a thought is folded, a model's HTML is text
        ask(page, "markdown")
        page.locator("#chat h1").filter(has_text="Title").wait_for()
        page.locator("#chat table").wait_for()
        assert page.locator("#chat tags").count() == 0
        wait_for_status(page, "generated")
        ask(page, "think")
        wait_for(page, "#chat", "the answer is 42")
        wait_for(page, "#chat", "Thought")
        wait_for_status(page, "generated")
        # stop ends an answer that would never end, and keeps it
        ask(page, "endless")
        wait_for(page, "#chat", "word9 ")
        page.locator("#stop").click()
        wait_for_status(page, "stopped; what there is is kept")
        # cleared is cleared, also while an answer comes
        ask(page, "endless")
        page.wait_for_function("document.querySelector('#chat').innerText.split('word9 ').length > 2")  # the second
        page.locator("#chat [aria-label=Clear]").click()
        wait_for_status(page, "nothing is kept")
        page.wait_for_function("!document.querySelector('#chat').innerText.includes('word9')")
        # what goes wrong is said, and what was typed is there again
        ask(page, "broken")
        wait_for_status(page, "error: the engine stopped; start again")
        page.wait_for_function("document.querySelector('#question textarea').value == 'broken'")


@in_a_browser
def test_a_models_answer_fetches_nothing() -> None:
    """What the page wants from elsewhere fails in `page_of`."""
    with page_of("-m", "tests.chat.fake_web") as page:
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text))
        ask(page, "elsewhere")
        wait_for(page, "#chat", "that was it")
        page.locator("#chat img[alt=look]").wait_for(state="attached")
        page.wait_for_function("document.querySelector('#chat img[alt=look]').complete")
        assert any("pictures.example.org" in text and "Content Security Policy" in text for text in refused), refused


@in_a_browser
def test_several_conversations_in_a_browser() -> None:
    with page_of("-m", "tests.chat.fake_web") as page:
        ask(page, "hello")
        wait_for(page, "#chat", "answer 1 to 'hello'")
        wait_for_status(page, "generated")
        page.locator("#new").click()
        wait_for(page, "#conversations", "2: new conversation")
        page.wait_for_function("!document.querySelector('#chat').innerText.includes('answer 1')")
        ask(page, "poem")
        wait_for(page, "#chat", "violets are blue")
        wait_for_status(page, "generated")
        page.locator("#conversations label").filter(has_text="1: hello").click()
        wait_for(page, "#chat", "answer 1 to 'hello'")
        assert page.locator("#chat").filter(has_text="violets").count() == 0
        page.locator("#delete").click()
        wait_for(page, "#chat", "violets are blue")
        assert page.locator("#conversations label").count() == 1


@in_a_browser
def test_two_people_at_once_and_one_who_leaves() -> None:
    with page_and_lines_of("-m", "tests.chat.fake_web") as (page, lines):
        ask(page, "endless")
        wait_for(page, "#chat", "word9 ")
        other = page.context.browser.new_page()
        other.set_default_timeout(TIMEOUT_MS)
        other.goto(page.url)
        ask(other, "poem")
        wait_for(other, "#chat", "violets are blue")
        assert "the answer to 'poem' is over" in next(lines)
        assert page.locator("#chat").filter(has_text="violets").count() == 0
        page.goto("about:blank")
        assert "the answer to 'endless' is over" in next(lines)


@in_a_browser
def test_a_page_for_a_server() -> None:
    flags = ("--server-port", "0", "--max-new-tokens", "8", "--temperature", "0")
    with Serving() as server, page_of("-m", "lmtool", "serve", "gradio", server.url, *flags) as page:
        wait_for(page, "body", "tiny · http")
        ask(page, "hello")
        assert "8 generated" in wait_for_status(page, "generated")
        ask(page, "again")
        page.wait_for_function("document.querySelectorAll('#chat .bot, #chat [data-testid=bot]').length >= 2")
