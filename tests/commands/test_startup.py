"""`lmtool --help` and every other help is fast, because it imports nothing heavy."""

import json
import subprocess
import sys

from lmtool import cli
from tests.commands.test_argv import _commands

HEAVY = ("torch", "triton", "transformers", "numpy", "prompt_toolkit", "huggingface_hub", "jinja2", "gguf")
SCRIPT = """
import json, sys
from lmtool.cli import main
for command in json.loads(sys.argv[1]):
    before = set(sys.modules)
    code = main([*command.split(), "--help"])
    print("LOADED", json.dumps([command, code, sorted(sys.modules.keys() - (before if command else set()))]))
"""


def test_help_leaves_heavy_libraries_alone() -> None:
    """One process for all of them: what is loaded is told by the first command that loads it."""
    commands = ["", *_commands(cli.build())]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    told = [json.loads(line.removeprefix("LOADED ")) for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    assert [command for command, _, _ in told] == commands
    for command, code, loaded in told:
        assert code == 0, command
        assert not set(HEAVY) & set(loaded), command
        assert not [name for name in loaded if name.startswith("lmtool.engine")], command
