"""One question, one answer: what goes to stdout and what does not."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lmtool.chat import oneshot
from lmtool.config import GenerationConfig
from lmtool.errors import InputError
from tests.chat.fake_chat import FakeBackend


def _stdin(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("prompt", "piped", "question"),
    [
        (None, b"hello\n", "hello"),
        ("Summarise:", b"a text\nof two lines\n", "Summarise:\n\na text\nof two lines"),
        ("hello", b"", "hello"),
        (None, "上海是".encode(), "上海是"),
        (None, b"  indented\n", "  indented"),
    ],
)
def test_the_question(prompt: str | None, piped: bytes, question: str) -> None:
    assert oneshot.read_question(prompt, _stdin(piped)) == question


@pytest.mark.parametrize(("prompt", "piped"), [(None, b""), (None, b" \n\n"), ("", b""), ("  ", b"\n")])
def test_an_empty_question_is_refused(prompt: str | None, piped: bytes) -> None:
    with pytest.raises(InputError, match="the prompt is empty; give --prompt"):
        oneshot.read_question(prompt, _stdin(piped))


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="stdin is not UTF-8 text"):
        oneshot.read_question(None, _stdin(b"ab\xff"))
    with pytest.raises(InputError, match="--prompt is not UTF-8 text"):
        oneshot.read_question("ab\udcff", _stdin(b""))  # what Python makes of such an argument


def _ask(question: str, **config: Any) -> tuple[FakeBackend, list[dict[str, str]], GenerationConfig]:
    return FakeBackend(1000), [{"role": "user", "content": question}], GenerationConfig(**config)


def test_stdout_is_the_answer_and_a_newline(capsys: pytest.CaptureFixture[str]) -> None:
    oneshot.print_answer(*_ask("poem"))
    assert capsys.readouterr() == ("roses are red\nviolets are blue\n", "")


def test_a_thought_is_no_part_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    oneshot.print_answer(*_ask("think"))
    out, err = capsys.readouterr()
    assert out == "the answer is 42\n"
    assert "thought first" in err


def test_an_answer_that_was_cut_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    oneshot.print_answer(*_ask("poem", max_new_tokens=2))
    out, err = capsys.readouterr()
    assert out == "roses \n"
    assert "stopped at 2 new tokens; a larger --max-new-tokens" in err


def test_a_model_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    oneshot.print_answer(*_ask("evil"))
    assert "\x1b" not in capsys.readouterr().out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    oneshot.print_json(*_ask("think", max_new_tokens=500), model="m", load_s=1.23456)
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert (data["text"], data["thought"], err) == ("the answer is 42", "first this, then that\n", "")
    assert set(data) == {
        *("model", "text", "thought", "finish_reason", "num_prompt_tokens", "num_cached_tokens"),
        *("num_generated_tokens", "time_to_first_token_s", "duration_s", "tokens_per_s", "load_s"),
    }
    assert out.count("\n") == 1


def test_json_escapes_what_a_terminal_would_obey() -> None:
    text = "\x1b\x7f\x9b\ud800 上海"
    written = oneshot.to_json({"text": text})
    assert json.loads(written) == {"text": text}
    assert "上海" in written
    assert not [c for c in written if c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff"]


def test_logprobs_are_in_the_json_when_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    oneshot.print_json(*_ask("poem", logprobs=0), model="m", load_s=0.0)
    assert json.loads(capsys.readouterr().out)["logprobs"] == []
