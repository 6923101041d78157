"""A conversion that is killed leaves what was there before, or all of the new: never a part."""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from lmtool.convert.inspection import inspect
from lmtool.convert.job import Job
from lmtool.convert.to_workspace import convert
from tests.quant.models import tiny_folder

# torch is imported once, in a process from which the others are forked
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["lmtool.convert.to_workspace", "tests.convert.test_killed"])


def run(model: str, destination: str, last_call: int, num_calls: Any) -> None:
    """Convert, and be killed at a certain call of a function: the same moment each time, however slow the machine."""
    count = 0

    def called(*event: object) -> None:
        nonlocal count
        count += 1
        if count == last_call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(called)
    convert(Job(source=Path(model), name=model, destination=Path(destination), overwrite=True))
    sys.setprofile(None)
    num_calls.value = count


def digest(folder: Path) -> str | None:
    if not folder.exists():
        return None
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def convert_until(last_call: int, model: Path, destination: Path) -> int:
    """Calls that were made; 0: it was killed."""
    num_calls = FORKED.Value("q", 0)
    process = FORKED.Process(target=run, args=(str(model), str(destination), last_call, num_calls))
    process.start()
    process.join()
    assert process.exitcode == (0 if num_calls.value else -signal.SIGKILL)
    return int(num_calls.value)


def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    destination = tmp_path / "workspace"
    num_calls = convert_until(0, model, destination)
    new = digest(destination)
    assert new is not None
    old_model = tiny_folder(tmp_path / "old model", num_hidden_layers=1)
    convert(Job(source=old_model, name="old", destination=tmp_path / "old"))
    old = digest(tmp_path / "old")
    chosen = random.Random(7)
    # files are written all the way, but the renames are among the last calls
    moments = [chosen.randrange(1, num_calls) for _ in range(12)] + [
        num_calls - chosen.randrange(400) for _ in range(8)
    ]
    seen = set()
    for turn, moment in enumerate(moments):
        shutil.rmtree(destination, ignore_errors=True)
        if turn % 2:
            shutil.copytree(tmp_path / "old", destination)
        convert_until(moment, model, destination)
        found = digest(destination)
        assert found in {new, old if turn % 2 else None}
        seen.add(found)
        if found is not None:
            inspect(destination)
    assert seen == {None, old, new}
    shutil.rmtree(destination, ignore_errors=True)
    assert convert_until(0, model, destination)  # what the killed ones left is in nobody's way
    assert digest(destination) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old", "old model", "workspace"]
