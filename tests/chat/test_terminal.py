"""The whole chat, driven through a real pseudo-terminal as a person's fingers would."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chat.terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    ENTER,
    SHIFT_ENTER,
    Terminal,
)


# ---------------------------------------------------------------- sending
def test_greets_answers_and_leaves_with_ctrl_d(chat: Terminal) -> None:
    assert "fake model · cpu" in chat.text
    chat.ask("hello there", r"answer 1 to 'hello there' in 1 lines")
    chat.send(CTRL_D)
    assert chat.end() == 0


@pytest.mark.parametrize("word", ["exit", "quit", "/exit"])
def test_words_that_leave(chat: Terminal, word: str) -> None:
    chat.send(word, ENTER)
    assert chat.end() == 0


def test_a_leading_space_sends_a_word_that_would_leave(chat: Terminal) -> None:
    chat.ask(" exit", r"answer 1 to 'exit'")


@pytest.mark.parametrize("newline", [ALT_ENTER, SHIFT_ENTER, "\x1b[27;2;13~", "\\" + ENTER])
def test_ways_to_make_a_new_line(chat: Terminal, newline: str) -> None:
    chat.send("one", newline, "two", ENTER)
    chat.wait(r"to 'one\\ntwo' in 2 lines")


def test_a_paste_keeps_its_paragraphs_and_waits_for_enter(chat: Terminal) -> None:
    chat.paste("first paragraph\r\rsecond paragraph")
    chat.wait("second paragraph")
    assert "answer" not in chat.text
    chat.send(ENTER)
    chat.wait(r"to 'first paragraph\\n\\nsecond\s+paragraph' in 3")


def test_double_enter_sends_on_an_empty_line(start_chat: Callable[..., Terminal]) -> None:
    chat = start_chat("--double-enter")
    chat.send("one", ENTER, "two", ENTER, ENTER)
    chat.wait(r"to 'one\\ntwo' in 2 lines")
    chat.prompt()
    chat.send("exit", ENTER)
    assert chat.end() == 0


def test_enter_on_nothing_sends_nothing(chat: Terminal) -> None:
    chat.send(ENTER, "  ", ENTER)
    chat.ask("hello", r"answer 1 to 'hello'")


# ---------------------------------------------------------------- Ctrl-C
def test_ctrl_c_stops_the_answer_and_keeps_the_turn(chat: Terminal, tmp_path: Path) -> None:
    chat.send("endless", ENTER)
    chat.wait("word9 ")
    chat.send(CTRL_C)
    chat.wait("stopped; what there is is kept")
    chat.prompt()
    saved = tmp_path / "chat.json"
    chat.ask(f"/save {saved}", "saved 1 turn")
    (turn,) = json.loads(saved.read_text())["turns"]
    assert turn["partial"] is True
    assert turn["assistant"].startswith("word0 word1 ")
    chat.ask("hello", r"answer 2 to 'hello'")


def test_what_is_typed_during_an_answer_is_not_drawn_into_it(chat: Terminal) -> None:
    chat.send("endless", ENTER)
    chat.wait("word9 ")
    chat.send("zzz")
    chat.wait("word50 ")
    chat.send(CTRL_C)
    chat.wait("stopped; what there is is kept")
    assert "zzz" not in chat.text
    assert "^C" not in chat.text


def test_what_is_typed_during_an_answer_is_in_the_next_prompt(chat: Terminal) -> None:
    chat.send("slow", ENTER)
    chat.wait("word9 ")
    chat.send("next question", ENTER)
    chat.wait("answer 2 to 'next question'")


def test_ctrl_c_again_after_stopping_leaves_with_130(chat: Terminal) -> None:
    chat.send("endless", ENTER)
    chat.wait("word9 ")
    chat.send(CTRL_C)
    chat.wait("Ctrl-C again leaves")
    chat.prompt()
    chat.send(CTRL_C)
    assert chat.end() == 130


def test_ctrl_c_at_an_empty_prompt_hints_and_then_leaves_with_130(chat: Terminal) -> None:
    chat.send(CTRL_C)
    chat.wait("Ctrl-C again leaves")
    chat.prompt()
    chat.send(CTRL_C)
    assert chat.end() == 130


def test_ctrl_c_between_two_prompts_leaves_with_130(chat: Terminal) -> None:
    chat.send(CTRL_C)
    chat.wait("Ctrl-C again leaves")
    chat.child.kill(signal.SIGINT)
    assert chat.end() == 130


def test_an_input_between_two_ctrl_c_takes_the_hint_back(chat: Terminal) -> None:
    chat.send(CTRL_C)
    chat.wait("Ctrl-C again leaves")
    chat.prompt()
    chat.ask("hello", "answer 1")
    chat.send(CTRL_C)
    chat.wait(r"(?s)again leaves.*answer 1.*again leaves")
    chat.prompt()  # between two prompts a Ctrl-D is the terminal's
    chat.send(CTRL_D)
    assert chat.end() == 0


def test_ctrl_c_clears_a_line_that_is_not_empty(chat: Terminal) -> None:
    chat.send("rubbish")
    chat.wait("> rubbish")
    chat.send(CTRL_C)
    chat.prompt()
    assert "again leaves" not in chat.text
    chat.ask("hello", r"answer 1 to 'hello'")


# ---------------------------------------------------------------- what is drawn
def test_markdown_comes_out_whole_and_once(chat: Terminal) -> None:
    chat.ask("markdown", "The end")
    answer = chat.text.split("> markdown\n")[1].split("\n>")[0]
    assert answer.strip("\n").splitlines() == [
        "Title",
        "",
        "Some bold text with code and <b>tags</b>.",
        "",
        " 1 first",
        "   still first",
        " 2 second",
        "",
        "```python",
        "def f(x):",
        "",
        "    return x",
        "```",
        "",
        " name  value",
        " ───────────",
        " a     1",
        " b     22",
        "",
        "The end.",
    ]


def test_a_block_taller_than_the_screen_scrolls_away_whole(chat: Terminal) -> None:
    chat.ask("tall", "line 59")
    lines = [line for line in chat.text.splitlines() if line.startswith("line ")]
    assert lines == [f"line {i}" for i in range(60)]


def test_line_breaks_are_kept(chat: Terminal) -> None:
    chat.ask("poem", "^roses are red\nviolets are blue$")


def test_no_markdown_streams_plain_text(start_chat: Callable[..., Terminal]) -> None:
    chat = start_chat("--no-markdown")
    chat.ask("markdown", r"Some \*\*bold\*\* text")


def test_a_thought_is_folded_and_shown_on_demand(chat: Terminal) -> None:
    chat.ask("think", "the answer is 42")
    assert "first this" not in chat.text
    assert re.search(r"thought for \d+ tokens", chat.text)
    chat.ask("/set think on", "think +on")
    chat.ask("think", r"(?s)first this, then that.*the answer is 42\s+>")


@pytest.mark.parametrize("flags", [(), ("--no-markdown",)])
def test_a_model_cannot_drive_the_terminal(flags: tuple[str, ...], start_chat: Callable[..., Terminal]) -> None:
    chat = start_chat(*flags)
    chat.ask("hello", "answer 1")
    begin = len(chat.raw)
    chat.ask("evil", "done")
    drawn = chat.raw[begin:]
    assert "\x1b]0;" not in drawn
    assert "\x07" not in drawn
    assert "\x1b[2J" not in drawn
    assert "\x1b[31m" not in drawn
    assert "␛]0;owned" in chat.text
    assert "answer 1" in chat.text  # nothing was cleared


def test_no_color_is_respected(start_chat: Callable[..., Terminal]) -> None:
    coloured = r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38|48)[0-9;]*m"
    chat = start_chat(NO_COLOR="1")
    chat.ask("markdown", "The end")
    chat.ask("/nothing", "error: there is no /nothing")
    assert not re.search(coloured, chat.raw)
    usual = start_chat()
    usual.ask("markdown", "The end")
    assert re.search(coloured, usual.raw)
