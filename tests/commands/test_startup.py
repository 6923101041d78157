"""Help is fast, and so is what is said of a model that is not there: neither imports anything heavy."""

import json
import subprocess
import sys

from lmtool import cli
from lmtool.errors import CheckpointError
from tests.commands.test_argv import _commands

HEAVIEST = {"torch", "triton", "transformers"}
HEAVY = {*HEAVIEST, "numpy", "prompt_toolkit", "huggingface_hub", "jinja2", "gguf", "lmtool.engine"}
SCRIPT = """
import json, sys
from lmtool.cli import main
for words in json.loads(sys.argv[1]):
    before = set(sys.modules)
    code = main(words)
    print("LOADED", json.dumps([words, code, sorted(sys.modules.keys() - (before if len(words) > 1 else set()))]))
"""


def check_light(lines: list[list[str]], exit_code: int, heavy: set[str]) -> None:
    """One process for all of them: what is loaded is told by the first command that loads it."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(lines)], capture_output=True, text=True, check=True)
    told = [json.loads(line.removeprefix("LOADED ")) for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    assert [words for words, _, _ in told] == lines
    for words, code, loaded in told:
        assert code == exit_code, words
        assert not heavy & set(loaded), words


def test_help_leaves_heavy_libraries_alone() -> None:
    commands = [[*command.split(), "--help"] for command in _commands(cli.build())]
    check_light([["--help"], *commands], cli.EXIT_OK, HEAVY)


def test_a_name_that_is_no_model_is_refused_before_torch_is_loaded() -> None:
    """By the commands that people type one into first."""
    check_light(
        [["chat", "no-such-model", "--prompt", "hello"], ["serve", "api_server", "no-such-model"]],
        CheckpointError.exit_code,
        HEAVIEST,
    )
