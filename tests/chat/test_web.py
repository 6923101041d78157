"""The chat's page in a headless Chromium that types and reads; what needs no browser first."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lmtool.chat.session import Session, Turn
from lmtool.chat.web_book import Answering, Book, answer_shown, sampling, shown
from lmtool.config import GenerationConfig
from lmtool.errors import InputError, RequestError
from tests.chat.browser import Web, ask, in_a_browser, page_of, wait_for, wait_for_status, web
from tests.chat.fake_chat import FakeBackend
from tests.chat.terminal import REPO


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
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=180)


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


def test_a_free_port_that_somebody_else_takes_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    web = pytest.importorskip("lmtool.chat.web")
    tried: list[int] = []

    def launch(page: Any, name: str, port: int) -> str:
        tried.append(port)
        if len(tried) < 3:
            raise OSError("Cannot find empty port")
        return f"{name}:{port}"

    monkeypatch.setattr(web, "_launch", launch)
    assert web.launch(None, "127.0.0.1", 0) == f"127.0.0.1:{tried[-1]}"
    assert len(tried) == 3
    tried.clear()
    with pytest.raises(OSError, match="empty port"):
        web.launch(None, "127.0.0.1", 7)
    assert tried == [7]


# ------------------------------------------------------------------ the browser
@pytest.fixture(scope="module")
def fake() -> Iterator[Web]:
    """The page of a scripted model; each test is somebody new there."""
    with web("-m", "tests.chat.fake_web") as served:
        yield served


@in_a_browser
def test_a_person_chats_in_a_browser(browser: Any, fake: Web) -> None:
    with page_of(browser, fake.url) as page:
        page.locator("#system textarea").fill("Be brief.")
        ask(page, "hello")
        wait_for(page, "#chat", "to 'hello' in 1 lines at 0.5")
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
        assert page.locator("#send").is_disabled()
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
def test_a_models_answer_fetches_nothing(browser: Any, fake: Web) -> None:
    """What the page wants from elsewhere fails in `page_of`."""
    with page_of(browser, fake.url) as page:
        said = ("pictures.example.org", "Content Security Policy")
        with page.expect_console_message(lambda message: all(words in message.text for words in said)):
            ask(page, "elsewhere")
        wait_for(page, "#chat", "that was it")
        page.locator("#chat img[alt=look]").wait_for(state="attached")
        page.wait_for_function("document.querySelector('#chat img[alt=look]').complete")


@in_a_browser
def test_several_conversations_in_a_browser(browser: Any, fake: Web) -> None:
    with page_of(browser, fake.url) as page:
        ask(page, "hello")
        wait_for(page, "#chat", "to 'hello' in")
        wait_for_status(page, "generated")
        page.locator("#new").click()
        wait_for(page, "#conversations", "2: new conversation")
        page.wait_for_function("!document.querySelector('#chat').innerText.includes('in 1 lines')")
        ask(page, "poem")
        wait_for(page, "#chat", "violets are blue")
        wait_for_status(page, "generated")
        page.locator("#conversations label").filter(has_text="1: hello").click()
        wait_for(page, "#chat", "to 'hello' in")
        page.wait_for_function("!document.querySelector('#chat').innerText.includes('violets')")
        page.locator("#delete").click()
        wait_for(page, "#chat", "violets are blue")
        page.wait_for_function("document.querySelectorAll('#conversations label').length == 1")


@in_a_browser
def test_two_people_at_once_and_one_who_leaves(browser: Any, fake: Web) -> None:
    def wait_for_line(text: str) -> None:
        assert any(text in line for line in fake.lines)

    with page_of(browser, fake.url) as page:
        ask(page, "endless")
        wait_for(page, "#chat", "word9 ")
        with page_of(browser, fake.url) as other:
            ask(other, "from another")
            wait_for(other, "#chat", "to 'from another' in")
            wait_for_line("the answer to 'from another' is over")
        assert page.locator("#chat").filter(has_text="another").count() == 0
        page.goto("about:blank")
        wait_for_line("the answer to 'endless' is over")
