"""`lmtool --help` and every other help is fast, because it imports nothing heavy."""

import subprocess
import sys

import pytest

from lmtool import cli
from tests.commands.test_argv import _commands

HEAVY = ("torch", "triton", "transformers", "numpy", "prompt_toolkit", "huggingface_hub", "jinja2", "gguf")
SCRIPT = """
import sys
from lmtool.cli import main
code = main(sys.argv[1:])
print("LOADED", *sorted(sys.modules))
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["", *_commands(cli.build())])
def test_help_leaves_heavy_libraries_alone(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split("LOADED ")[1].split()
    assert not set(HEAVY) & set(loaded)
    assert not [name for name in loaded if name.startswith("lmtool.engine")]
