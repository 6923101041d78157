"""Killed in the middle and started again: the bytes of a run that was left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmtool.errors import ConfigError
from lmtool.quant.state import State
from tests.quant.models import run, text_file, tiny_folder

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[5]))
from lmtool.quant import pipeline, state
from tests.quant.models import Silent, job

where, model, out, text = sys.argv[1], *map(Path, sys.argv[2:5])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Watcher(Silent):
    def block_done(self, block, report, seconds):
        if where == "after block 0" and block == 0:
            die()
    def writing(self):
        if where == "before the model is written":
            die()

commit = state.State.commit
def commit_or_die(self, block, *rest):
    if where == "before block 1 is committed" and block == 1:
        die()
    commit(self, block, *rest)
state.State.commit = commit_or_die

pipeline.quantize(job(model, out, text), Watcher())
print(torch.get_num_threads())
"""


def quantize(where: str, model: Path, out: Path, text: Path, num_threads: int = 1) -> int:
    """In a process of its own. Its exit status, or where it came to its end how many threads it had then."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, where, str(model), str(out), str(text), str(num_threads)]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode or int(done.stdout)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.slow
def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    model, text, out = tiny_folder(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "out"
    assert quantize("nowhere", model, tmp_path / "whole", text, num_threads=2) == 2
    # how many threads share a sum decides its last bits: the first run's are what the others take
    assert quantize("after block 0", model, out, text, num_threads=2) == -signal.SIGKILL
    for where in ("before block 1 is committed", "before the model is written"):
        assert quantize(where, model, out, text) == -signal.SIGKILL
        assert not (out / "config.json").exists()
        assert (out / ".state" / "block-00000.json").exists()
    done = (out / ".state" / "block-00002.json").stat().st_mtime_ns
    assert quantize("nowhere", model, out, text) == 2
    assert files(out) == files(tmp_path / "whole")
    assert done < (out / "config.json").stat().st_mtime_ns  # the last run wrote the model, not the blocks


def test_other_options_are_refused_and_fresh_starts_over(tmp_path: Path) -> None:
    model, text, out = tiny_folder(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "out"
    first = run(model, out, text)
    again = run(model, out, text)
    assert again == first
    for changed in ({"method": "awq"}, {"seed": 5}, {"samples": 5}, {"skip": ("down",)}):
        with pytest.raises(ConfigError, match=r"holds a run with other options: .*; give --fresh to start over"):
            run(model, out, text, **changed)
    before = files(out)
    run(model, out, text, method="awq", fresh=True)
    assert files(out)["model.safetensors"] != before["model.safetensors"]
    run(model, out, text, fresh=True)
    assert files(out) == before


def test_another_model_in_the_same_work_dir_is_refused(tmp_path: Path) -> None:
    text, out = text_file(tmp_path / "text.txt"), tmp_path / "out"
    run(tiny_folder(tmp_path / "model"), out, text)
    with pytest.raises(ConfigError, match="other options: model"):
        run(tiny_folder(tmp_path / "other", rms_norm_eps=1e-6), out, text)


def test_a_resumed_run_has_as_many_threads_as_the_first(tmp_path: Path) -> None:
    first = State(tmp_path, {"model": "m"}, (0,), fresh=False)
    assert first.num_threads(available=2) == 2
    assert State(tmp_path, {"model": "m"}, (0,), fresh=False).num_threads(available=1) == 2
    assert State(tmp_path, {"model": "m"}, (0,), fresh=True).num_threads(available=1) == 1
