"""`lmtool chat` with the real model, where it is installed: what scripts rely on."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmtool import cli
from lmtool.checkpoint.hub import SHORT_NAMES
from lmtool.commands.options import DEFAULT_MODEL
from tests.chat.terminal import CTRL_D, ENTER, Terminal

pytestmark = pytest.mark.skipif(
    SHORT_NAMES[DEFAULT_MODEL].installed_file() is None, reason="the default model is not installed"
)
QUESTION = "What is the capital of France?"


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: its exit code, stdout and stderr."""

    def run(*flags: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        return cli.main(["chat", *flags]), *capsys.readouterr()

    return run


def test_a_piped_question_gives_only_the_answer() -> None:
    command = [sys.executable, "-m", "lmtool", "chat", "--temperature", "0"]
    done = subprocess.run(command, input=QUESTION, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_json_with_logprobs_and_the_course_s_spelling_of_the_engine(chat: Callable[..., tuple[int, str, str]]) -> None:
    flags = ("turbomind", DEFAULT_MODEL, "--json", "--temperature", "0", "--max_new_tokens", "3", "--logprobs", "2")
    code, out, err = chat(*flags, stdin=QUESTION)
    data = json.loads(out)
    assert data["finish_reason"] == "length"
    assert data["num_generated_tokens"] == 3
    assert data["num_prompt_tokens"] > 10
    assert 0 < data["time_to_first_token_s"] <= data["duration_s"]
    assert (code, err) == (0, "lmtool: turbomind is taken as lmtool's own engine; there is one\n")
    assert len(data["logprobs"]) == 3
    for entry in data["logprobs"]:
        assert set(entry) == {"token_id", "token", "logprob", "top"}
        found = [other["logprob"] for other in entry["top"]]
        assert found == sorted(found, reverse=True)
    assert data["logprobs"][0]["top"][0]["token"] == data["logprobs"][0]["token"]  # greedy


def test_ctrl_c_ends_one_answer_with_130() -> None:
    command = [sys.executable, "-m", "lmtool", "chat", "--prompt", "Write a long story.", "--temperature", "0"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.send_signal(signal.SIGINT)
        assert child.wait(180) == 130
        assert child.stderr.read() == b""


@pytest.mark.parametrize("flags", [(), ("--prompt", "x")])
def test_a_history_that_cannot_be_kept_is_said_before_loading(flags: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "lmtool").write_text("a file where a folder should be")
    terminal = Terminal("-m", "lmtool", "chat", "no-such-model", *flags, XDG_STATE_HOME=str(tmp_path))
    assert terminal.end() == 2
    wanted = "'no-such-model' is no folder" if flags else "cannot keep the history in"
    assert wanted in " ".join(terminal.text.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [("awq", "--model-format is 'awq', "), ("onnx", "--model-format is 'onnx'; give one of hf, awq, gptq, gguf")],
)
def test_a_format_that_the_model_has_not_is_refused(
    name: str, message: str, chat: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = chat("--model-format", name, "--prompt", "hello")
    assert (code, out) == (2, "")
    assert message in err


def test_show_prompt_is_the_template_and_needs_no_engine(chat: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = chat("--show-prompt", "--system", "Be brief.", "--prompt", "hello", stdin="and more")
    assert code == 0
    assert out == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello\n\nand more<|im_end|>\n"
        "<|im_start|>assistant\n\n"
    )
    assert re.fullmatch(r"lmtool: \d+ tokens\n", err)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m lmtool chat --temperature 0 --max-new-tokens 40 | head -c 5"
    done = subprocess.run(["/bin/sh", "-c", command], input=QUESTION, capture_output=True, text=True)
    assert (len(done.stdout), done.stderr) == (5, "")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal("-m", "lmtool", "chat", "--temperature", "0", XDG_STATE_HOME=str(tmp_path))
    terminal.prompt()
    yield terminal
    terminal.close()


def test_a_conversation_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    assert "loaded in" in terminal.text
    terminal.ask(QUESTION, "Paris")
    terminal.ask("And of Italy?", "Rome")
    terminal.ask("/stats", "total       2 answers")
    terminal.wait(r"context [1-9][\d,]*/[\d,]+ tokens")
    terminal.send("Write a very long story about a dragon.", ENTER)
    terminal.wait(r"dragon\.\n(?!reading).*\w+ \w+ \w+ \w+")
    terminal.send("\x03")
    terminal.wait("stopped; what there is is kept")
    terminal.prompt()
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    assert QUESTION in (tmp_path / "lmtool" / "chat_history").read_text()
