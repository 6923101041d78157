"""The command line as a whole: help everywhere, one line for every error, the exit codes."""

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import lmtool
from lmtool import __main__, cli
from lmtool.errors import EngineError, InputError
from tests.commands.test_argv import _commands


def _main(*args: str) -> int:
    return cli.main(list(args))


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("lmtool: error: ")
    return err


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", ["", *_commands(cli.build())])
def test_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(*command.split(), flag) == 0
    assert "Usage: lmtool" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "command"), [((), "chat"), (("bench",), "offline")])
def test_no_command_shows_the_help(words: tuple[str, ...], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(*words) == 0
    shown = capsys.readouterr()
    assert command in shown.out
    assert shown.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("--version") == 0
    assert capsys.readouterr().out == f"lmtool {lmtool.__version__}\n"


def test_both_spellings_of_a_command_and_of_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("check_env", "--help") == _main("check-env", "--help") == 0
    assert _main("chat", "--max_new_tokens", "0") == 2
    assert "--max-new-tokens is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("caht", "No such command 'caht'. Did you mean 'chat'?; see `lmtool --help`"),
        ("chat --tempratur 1", "--temperature); see `lmtool chat --help`"),
        ("chat --seed x", "Invalid value for '--seed'"),
        ("chat a b", "unexpected extra argument"),
        ("chat --model", "No such option: --model"),
        ("chat --temperature -1", "--temperature is -1.0; give 0 (greedy), or a millionth to 100"),
        ("chat --temperature nan", "--temperature is nan"),
        ("chat --top-p 0", "--top-p is 0.0; give a number above 0"),
        ("chat --dtype int3", "--dtype is 'int3'; give one of auto"),
        ("chat --cache-max-entry-count 2", "--cache-max-entry-count is 2.0; give a share"),
        ("chat --session-len 0", "--session-len is 0"),
        ("chat --logprobs 2 --prompt x", "--logprobs has nowhere to go; give --json"),
        ("chat --json --show-prompt --prompt x", "--json and --show-prompt are two outputs; give one"),
        ("chat --backend cuda", "--backend is 'cuda'"),
        ("chat", "the prompt is empty"),
        ("chat --logprobs 99 --json --prompt x", "--logprobs is 99; give 0 to 20"),
        ("chat no-such-model --prompt x", "'no-such-model' is no folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert _main(*line.split()) == 2
    assert message in _one_line(capsys)


class _Failing:
    """Stands where the command tree is: a command that ends in some way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def main(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("cause", "fix"), 2, "lmtool: error: cause; fix\n"),
        (EngineError("several\nlines"), 1, "lmtool: error: several lines\n"),
        (
            ZeroDivisionError("oops"),
            1,
            "lmtool: error: ZeroDivisionError: oops; run with -v for the traceback\n",
        ),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            2,
            "lmtool: error: gguf is not installed; `lmtool check_env` says what to install\n",
        ),
        (
            PermissionError(13, "Permission denied", "/x/model.safetensors"),
            2,
            "lmtool: error: /x/model.safetensors: permission denied; change its mode, or give another file\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "build", lambda: _Failing(error))
    assert _main() == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("line", ["-v chat --temperature -1", "chat -v --temperature -1"])
def test_verbose_adds_the_traceback(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(*line.split()) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("lmtool: error: --temperature is -1.0")
    assert _main("chat", "--temperature", "-1") == 2  # and only for the run that asked
    assert "Traceback" not in capsys.readouterr().err


def test_completion_script_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lmtool"],
        env={"_LMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": "lmtool ch", "COMP_CWORD": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["chat", "check-env"]


def test_help_of_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m lmtool chat --help | head -1"], capture_output=True, text=True
    )
    assert done.stderr == ""


def test_ctrl_c_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "lmtool.cli", Interrupted("lmtool.cli"))
    assert __main__.main() == cli.EXIT_INTERRUPTED
