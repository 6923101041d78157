"""`lmtool check_env`: a verdict on every capability, also where packages are missing or broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmtool import cli

WITHOUT = """
import sys, importlib.abc

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if name == "gguf":
            raise OSError("libbroken.so: cannot open")

sys.meta_path.insert(0, Missing())
from lmtool.cli import main
sys.exit(main(["check_env", "--json"]))
"""


def test_the_environment_and_a_verdict_on_each_capability(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check_env"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "memory", "driver", "works  engine on the CPU", "default model"):
        assert word in out


def test_it_works_where_packages_are_missing_or_broken(tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(WITHOUT.format(missing={"torch", "prompt_toolkit", "huggingface_hub"}))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    verdicts = {verdict["capability"]: verdict for verdict in json.loads(done.stdout)["verdicts"]}
    assert verdicts["engine on the CPU"]["fix"] == "pip install . in lmtool's folder"
    assert "torch is not installed" in verdicts["engine on the CPU"]["detail"]
    assert verdicts["chat on the terminal"]["fix"] == "pip install '.[chat]' in lmtool's folder"
    assert "cannot be imported (OSError: libbroken.so" in verdicts["GGUF files"]["detail"]
    assert verdicts["tokenizers of InternLM and Qwen 1"]["fix"] is None
