"""Pickle weights: opened in a process that can reach nothing, and come out as safetensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmtool import cli
from lmtool.checkpoint.workspace import Workspace
from lmtool.convert.unpickle import pickle_files
from tests.convert.test_refusals import refused
from tests.quant.models import tiny_folder

REACHES = """
import os, socket
from lmtool.convert.fence import fence
fence()
tries = {
    "a file": lambda: open("/etc/passwd"),
    "the network": lambda: socket.socket(socket.AF_INET),
    "a socket of this machine": lambda: socket.socket(socket.AF_UNIX),
    "a program": lambda: os.execv("/bin/true", ["true"]),
    "a process": os.fork,
    "another process": lambda: os.kill(os.getppid(), 0),
    "a folder": lambda: os.mkdir("new"),
    "a name": lambda: os.rename("here", "there"),
    "a file's end": lambda: os.unlink("here"),
    "a mode": lambda: os.chmod("here", 0o777),
}
for what, reach in tries.items():
    try:
        reach()
        print("reached", what)
    except PermissionError:
        pass
print("still computes", sum(range(10)))
"""


class Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A model in two pickle files, as transformers once wrote them, with what training leaves beside."""
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, some in parts.items():
        torch.save({name: tensors[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    return folder


def test_behind_the_fence_nothing_can_be_reached(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("x")
    done = subprocess.run([sys.executable, "-c", REACHES], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "still computes 45\n"
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_become_a_workspace(zipped: bool, pickled: Path) -> None:
    if not zipped:
        for file in pickle_files(pickled):
            torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    destination = pickled.parent / "w"
    assert cli.main(["convert", str(pickled), "--allow-bin", "--dst-path", str(destination)]) == 0
    workspace = Workspace(destination)
    assert sorted(workspace.manifest.source.files) == [file.name for file in pickle_files(pickled)]
    expected = load_file(pickled.parent / "model.safetensors")
    assert torch.equal(workspace.tensor("embed"), expected["model.embed_tokens.weight"])
    assert torch.equal(workspace.tensor("layers.2.down.weight"), expected["model.layers.2.mlp.down_proj.weight"])
    assert sorted(path.name for path in pickled.parent.iterdir()) == ["model", "model.safetensors", "w"]


def test_a_pickle_that_runs_code_is_refused(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model.norm.weight": Evil(pickled / "run")}, pickled / "pytorch_model-00001-of-00002.bin")
    line = refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")
    assert "pytorch_model-00001-of-00002.bin holds more than tensors" in line
    assert not (pickled / "run").exists()
    assert sorted(path.name for path in pickled.parent.iterdir()) == ["model", "model.safetensors"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": 5}, "'a' is a int, not a dense tensor"),
        ([1, 2], "it holds a list, not tensors by name"),
        ({"../a": torch.zeros(2)}, "holds a tensor named '../a'"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a holds complex64 numbers"),
        ({"state_dict": {"a": torch.zeros(2)}}, "tensors are missing"),
    ],
)
def test_what_is_no_weights_is_refused(
    content: object, said: str, pickled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, pickled / "pytorch_model-00001-of-00002.bin")  # the first that is opened
    assert said in refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")


def test_a_few_bytes_that_would_fill_the_memory(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, pickled / "pytorch_model-00001-of-00002.bin")
    line = refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")
    assert "'a' repeats what is stored of it" in line


def test_what_is_no_pickle_is_not_called_one(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pickled / "pytorch_model-00001-of-00002.bin").write_text("hello")
    line = refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")
    assert "pytorch_model-00001-of-00002.bin cannot be read" in line


def test_two_files_of_one_name(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pickled / "pytorch_model.bin.index.json").unlink()  # it would say which is meant
    name = "pytorch_model-00002-of-00002"
    (pickled / f"{name}.bin").rename(pickled / f"{name}.pt")
    torch.save({}, pickled / f"{name}.bin")
    line = refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")
    assert f"{pickled} holds several files named {name}" in line


def test_errors_name_the_model_and_not_the_folder_on_the_way(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pickled / "pytorch_model-00002-of-00002.bin").unlink()
    line = refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")
    assert str(pickled) in line
    assert "unpickled" not in line


def test_a_single_pickle_is_told_what_to_give(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pickled / "pytorch_model-00001-of-00002.bin"
    line = refused(capsys, "convert", file, "--allow-bin", "--dst-path", pickled.parent / "w")
    assert "is one file; give the folder" in line


def test_a_broken_pickle_is_told(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pickled / "pytorch_model-00001-of-00002.bin"
    os.truncate(file, file.stat().st_size // 2)
    assert file.name in refused(capsys, "convert", pickled, "--allow-bin", "--dst-path", pickled.parent / "w")


def test_pickles_are_opened_only_when_asked(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "convert", pickled, "--dst-path", pickled.parent / "w")
    assert "is a pickle file, which runs code when it is opened" in line
    assert "--allow-bin" in line


def test_the_flag_needs_pickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "model")
    assert "has no pickle weights" in refused(capsys, "convert", model, "--allow-bin", "--dst-path", tmp_path / "w")
