"""Slash commands, a full context and the history, on a real pseudo-terminal."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chat.terminal import (
    CTRL_C,
    CTRL_D,
    ENTER,
    TAB,
    UP,
    Terminal,
)
from tests.server.pictures import picture


# ---------------------------------------------------------------- slash commands
def test_help_lists_every_command(chat: Terminal) -> None:
    chat.ask("/help", r"Ctrl-D, exit and quit leave")
    for name in ("system", "set", "show", "save", "load", "image", "regen", "undo", "clear", "stats", "exit"):
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


def test_save_and_load_in_another_run(chat: Terminal, tmp_path: Path, start_chat: Callable[..., Terminal]) -> None:
    saved = tmp_path / "my chat.json"
    chat.ask("/system be brief", "system prompt: be brief")
    chat.ask("hello", "answer 1")
    chat.ask(f"/save {saved}", "saved 1 turn")
    again = start_chat()
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


# ---------------------------------------------------------------- pictures
@pytest.fixture
def seeing(start_chat: Callable[..., Terminal]) -> Terminal:
    return start_chat("--takes-pictures", columns=200)  # paths of tests are long


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "my cat.png"
    path.write_bytes(picture(60, 40))
    return path


def test_pictures_go_with_the_next_message_and_stay(
    seeing: Terminal, cat: Path, tmp_path: Path, start_chat: Callable[..., Terminal]
) -> None:
    seeing.ask("/image", "no picture waits for your next message")
    seeing.ask(f"/image {cat}", r"1\. my cat\.png, 60 × 40, \d+ kB")
    seeing.wait("1 picture for your next message")
    seeing.ask(f"/image '{cat}'", r"2\. my cat\.png")  # as a terminal writes a file that is dropped on it
    seeing.ask("what is this", r"answer 1 to 'what is this with 2 pictures'")
    seeing.ask("/image", "no picture waits")
    seeing.wait(r"context 3\d/1,000 tokens")  # 20 of them are the pictures'
    seeing.ask("and then", r"answer 2 to 'and then' in")
    seeing.ask("/undo", "took back: and then")
    seeing.ask("/regen", r"answer 3 to 'what is this with 2 pictures'")
    seeing.ask("/show", "1 turn with 2 pictures")
    seeing.ask(f"/save {tmp_path}/a.json", "saved 1 turn with 2 pictures")
    cat.unlink()
    again = start_chat("--takes-pictures", columns=200)
    again.ask(f"/load {tmp_path}/a.json", "loaded 1 turn with 2 pictures")
    again.ask("/regen", r"answer 1 to 'what is this with 2 pictures'")


def test_pictures_wait_until_they_were_sent(seeing: Terminal, cat: Path) -> None:
    seeing.ask(f"/image {cat}", r"1\. my cat\.png")
    seeing.ask("broken", "error: the engine stopped")
    seeing.ask("/image", r"1\. my cat\.png")
    seeing.ask("/image clear", "1 picture dropped")
    seeing.ask("hello", "answer [12] to 'hello' in")


def test_what_is_no_picture_is_refused(seeing: Terminal, chat: Terminal, cat: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary")
    for source in (text, tmp_path / "nothing.png", tmp_path):
        seeing.ask(f"/image {source}", "error: .*")
    seeing.ask("/image", "no picture waits for your next message")
    seeing.ask("/image http://127.0.0.1:1/a.png", r"error: [\s\S]*127\.0\.0\.1")
    chat.ask(f"/image {cat}", "error: this model takes no pictures")


def test_tab_completes_the_files_of_pictures(seeing: Terminal, cat: Path) -> None:
    seeing.send(f"/image {cat.parent}/my", TAB)
    seeing.wait(r"my cat\.png")
    seeing.send(ENTER)
    seeing.wait(r"1\. my cat\.png")


# ---------------------------------------------------------------- context
def test_the_toolbar_counts_the_context(chat: Terminal) -> None:
    chat.wait(r"context 0/1,000 tokens")
    chat.ask("one two three", "answer 1")
    chat.wait(r"context [1-9]\d*/1,000 tokens")
    chat.ask("/clear", "the conversation is empty")
    chat.wait(r"context 0/1,000 tokens")


def test_a_full_context_offers_what_to_drop(start_chat: Callable[..., Terminal]) -> None:
    chat = start_chat("--session-len", "40")
    chat.ask("a b c d e", "answer 1")
    chat.ask("f g h i j", "answer 2")
    chat.send("k l m n o p q r s t", ENTER)
    chat.wait(r"the context is full: the conversation has \d\d tokens")
    chat.wait(r"drop the oldest turn, which leaves \d+ tokens\? \[y/N\]|drop the 2 oldest turns")
    chat.send("n", ENTER)
    chat.wait(r"nothing was sent or dropped[\s\S]*^> k l m n o p q r s t")  # the text is there again
    chat.send(ENTER)
    chat.wait(r"(?s)\[y/N\].*\[y/N\]")
    chat.send("y", ENTER)
    chat.wait("answer 3 to 'k l m")


def test_a_message_longer_than_the_context_is_refused_with_both_counts(start_chat: Callable[..., Terminal]) -> None:
    chat = start_chat("--session-len", "5")
    chat.ask("a b c d e f", r"error: the message has 6 tokens with the system prompt, the context holds 5")


# ---------------------------------------------------------------- history
def test_history_lives_across_runs_and_is_private(tmp_path: Path, start_chat: Callable[..., Terminal]) -> None:
    history = tmp_path / "state" / "history"
    chat = start_chat("--history", str(history))
    chat.ask("remember me", "answer 1")
    chat.send(CTRL_D)
    assert chat.end() == 0
    assert history.stat().st_mode & 0o077 == 0
    again = start_chat("--history", str(history))
    again.send(UP)
    again.wait("^> remember me")
