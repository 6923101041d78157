"""The whole chat, driven through a real pseudo-terminal as a person's fingers would."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat.terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    ENTER,
    SHIFT_ENTER,
    TAB,
    UP,
    Terminal,
    fake_chat,
)


@pytest.fixture
def chat() -> Iterator[Terminal]:
    terminal = fake_chat()
    yield terminal
    terminal.child.close(force=True)


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


def test_double_enter_sends_on_an_empty_line() -> None:
    chat = fake_chat("--double-enter")
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


def test_an_input_between_two_ctrl_c_takes_the_hint_back(chat: Terminal) -> None:
    chat.send(CTRL_C)
    chat.wait("Ctrl-C again leaves")
    chat.prompt()
    chat.ask("hello", "answer 1")
    chat.send(CTRL_C)
    chat.wait(r"(?s)again leaves.*answer 1.*again leaves")
    chat.send(CTRL_D)
    assert chat.end() == 0


def test_ctrl_c_clears_a_line_that_is_not_empty(chat: Terminal) -> None:
    chat.send("rubbish")
    chat.wait("> rubbish")
    chat.send(CTRL_C)
    chat.prompt()
    assert "again leaves" not in chat.text
    chat.ask("hello", r"answer 1 to 'hello'")


# ---------------------------------------------------------------- slash commands
def test_help_lists_every_command(chat: Terminal) -> None:
    chat.ask("/help", r"Ctrl-D, exit and quit leave")
    for name in ("system", "set", "show", "save", "load", "regen", "undo", "clear", "stats", "exit"):
        assert re.search(rf"^/{name} ", chat.text, re.MULTILINE), name


def test_regen_and_undo(chat: Terminal) -> None:
    chat.ask("hello", "answer 1 to 'hello'")
    chat.ask("/regen", r"at temperature 0 the answer is the same[\s\S]*answer 2 to 'hello'")
    chat.ask("/set temperature 0.7", r"temperature +0\.7")
    chat.ask("/regen", "answer 3 to 'hello'")
    assert chat.text.count("the answer is the same") == 1
    chat.ask("/show", "1 turn,")
    chat.ask("/undo", "took back: hello")
    chat.ask("/undo", "error: there is no turn to take back; ask something first")


def test_an_answer_that_fails_puts_the_replaced_turn_back(chat: Terminal) -> None:
    chat.ask("/system x", "system prompt: x")
    chat.ask("broken", "error: the engine stopped; start again")
    chat.ask("/show", "0 turns")


def test_save_and_load_in_another_run(chat: Terminal, tmp_path: Path) -> None:
    saved = tmp_path / "my chat.json"
    chat.ask("/system be brief", "system prompt: be brief")
    chat.ask("hello", "answer 1")
    chat.ask(f"/save {saved}", "saved 1 turn")
    again = fake_chat()
    again.ask(f"/load {saved}", r"loaded 1 turn[\s\S]*the\s+last: hello")
    again.ask("/show", "system prompt: be brief")
    again.ask("/load /etc/hosts", "error: /etc/hosts is not a saved chat")


def test_set_is_validated_and_used(chat: Terminal) -> None:
    chat.ask("/set temperature 0.25", r"temperature +0\.25")
    chat.ask("/set temperature -1", r"error: --temperature is -1\.0; give 0")
    chat.ask("hello", r"in 1 lines at 0\.25")
    chat.ask("/set temprature 1", "did you mean 'temperature'")
    chat.ask("/set max-new-tokens 3", r"max_new_tokens +3")
    chat.ask("hello", "stopped at max_new_tokens")


def test_an_unknown_command_names_the_nearest(chat: Terminal) -> None:
    chat.ask("/regne", "error: there is no /regne; did you mean /regen?")


def test_a_path_is_no_command(chat: Terminal) -> None:
    chat.ask("/etc/hosts is what?", "answer 1 to '/etc/hosts")


def test_tab_completes_commands_and_settings(chat: Terminal) -> None:
    chat.send("/reg", TAB)
    chat.wait(r"^> /regen")
    chat.send(CTRL_C)
    chat.prompt()
    chat.send("/set tempe", TAB)
    chat.wait(r"^> /set temperature")
    chat.send(" 0.5", ENTER)
    chat.wait(r"temperature +0\.5")


def test_stats_tell_what_was_cached(chat: Terminal) -> None:
    chat.ask("/stats", "error: there is no answer yet")
    chat.ask("one two three", "answer 1")
    chat.ask("four five", "answer 2")
    chat.ask("/stats", "total       2 answers")
    assert re.search(r"prompt +[\d,]+ tokens, 3 of them cached", chat.text)
    assert "tokens/s" in chat.text


# ---------------------------------------------------------------- context
def test_the_toolbar_counts_the_context(chat: Terminal) -> None:
    chat.wait(r"context 0/1,000 tokens")
    chat.ask("one two three", "answer 1")
    chat.wait(r"context [1-9]\d*/1,000 tokens")
    chat.ask("/clear", "the conversation is empty")
    chat.wait(r"context 0/1,000 tokens")


def test_a_full_context_offers_what_to_drop() -> None:
    chat = fake_chat("--session-len", "40")
    chat.ask("a b c d e", "answer 1")
    chat.ask("f g h i j", "answer 2")
    chat.send("k l m n o p q r s t", ENTER)
    chat.wait(r"the context is full: the conversation has \d\d tokens")
    chat.wait(r"drop the oldest turn, which leaves \d+ tokens\? \[y/N\]|drop the 2 oldest turns")
    chat.send("n", ENTER)
    chat.wait("nothing was sent or dropped")
    chat.wait(r"^> k l m n o p q r s t")  # the text is there again
    chat.send(ENTER)
    chat.wait(r"(?s)\[y/N\].*\[y/N\]")
    chat.send("y", ENTER)
    chat.wait("answer 3 to 'k l m")


def test_a_message_longer_than_the_context_is_refused_with_both_counts() -> None:
    chat = fake_chat("--session-len", "5")
    chat.ask("a b c d e f", r"error: the message has 6 tokens with the system prompt, the context holds 5")


# ---------------------------------------------------------------- history
def test_history_lives_across_runs_and_is_private(tmp_path: Path) -> None:
    history = tmp_path / "state" / "history"
    chat = fake_chat("--history", str(history))
    chat.ask("remember me", "answer 1")
    chat.send(CTRL_D)
    assert chat.end() == 0
    assert history.stat().st_mode & 0o077 == 0
    again = fake_chat("--history", str(history))
    again.send(UP)
    again.wait("^> remember me")


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


def test_no_markdown_streams_plain_text() -> None:
    chat = fake_chat("--no-markdown")
    chat.ask("markdown", r"Some \*\*bold\*\* text")


def test_a_thought_is_folded_and_shown_on_demand(chat: Terminal) -> None:
    chat.ask("think", "the answer is 42")
    assert "first this" not in chat.text
    assert re.search(r"thought for \d+ tokens", chat.text)
    chat.ask("/set think on", "think +on")
    chat.ask("think", r"(?s)first this, then that.*the answer is 42\s+>")


@pytest.mark.parametrize("flags", [(), ("--no-markdown",)])
def test_a_model_cannot_drive_the_terminal(flags: tuple[str, ...]) -> None:
    chat = fake_chat(*flags)
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


def test_no_color_is_respected() -> None:
    coloured = r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38|48)[0-9;]*m"
    chat = fake_chat(NO_COLOR="1")
    chat.ask("markdown", "The end")
    chat.ask("/nothing", "error: there is no /nothing")
    assert not re.search(coloured, chat.raw)
    usual = fake_chat()
    usual.ask("markdown", "The end")
    assert re.search(coloured, usual.raw)
