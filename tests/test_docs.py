"""Every `lmtool …` line in the documents parses as written, and the Python block of the README runs."""

import re
import shlex
from pathlib import Path

import pytest

from lmtool import cli
from lmtool.argv import translate

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:sh)?\n(.*?)```", document.read_text(), flags=re.DOTALL):
            for line in block.splitlines():
                command = line.split("|")[-1].strip()
                if command.startswith("lmtool "):
                    found.append((document.name, command.split(" < ")[0].split(" > ")[0]))
    return found


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_a_documented_command_parses(document: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = cli.build()
    args = translate(words)
    context = command.make_context("lmtool", list(args), resilient_parsing=True)
    while args and hasattr(command, "resolve_command"):
        if args[0].startswith("-"):
            return  # flags of lmtool itself
        _, command, args = command.resolve_command(context, list(args))
        assert command is not None, f"{document}: no such command"
        if not hasattr(command, "resolve_command"):
            command.make_context(command.name, list(args), parent=context)


def test_there_are_commands_to_check() -> None:
    assert len(command_lines()) >= 8


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out
