"""What cannot be converted or is damaged: one line with the cause, exit code 2, and the destination as it was."""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from tests.quant.models import tiny_folder


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


# ---------------------------------------------------------------------- a source or a destination that will not do


def test_a_source_that_links_out_of_its_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = model.parent / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    (model / "model.safetensors").symlink_to(outside)
    destination = model.parent / "w"
    assert "is a link out of the model's folder" in refused(capsys, "convert", model, "--dst-path", destination)
    assert not destination.exists()


def test_the_hub_s_own_links_are_followed(model: Path) -> None:
    repo = model.parent / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    model.rename(repo / "snapshots/abc")
    for file in (repo / "snapshots/abc").iterdir():
        file.rename(repo / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert cli.main(["convert", str(repo / "snapshots/abc"), "--dst-path", str(model.parent / "w")]) == 0


@pytest.mark.parametrize("name", ["model.layers..0.weight", "../../etc/passwd", "a/b"])
def test_a_tensor_with_a_name_that_leads_elsewhere(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: torch.zeros(2)}, model / "model.safetensors")
    assert f"holds a tensor named '{name}'" in refused(capsys, "convert", model, "--dst-path", model.parent / "w")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model-format", "awq"], "--model-format is 'awq', MODEL is 'hf'"),
        (["--model-format", "onnx"], "--model-format is 'onnx'; give one of hf"),
        (["--group-size", "64"], "--group-size is 64, MODEL has no groups"),
        (["--tp", "3"], "--tp 3 does not divide the model's 4 attention heads"),
        (["--tp", "0"], "--tp is 0"),
        (["--dtype", "float8"], "--dtype is 'float8'"),
        (["--to", "onnx"], "--to is 'onnx'"),
        (["--dense"], "--dense means nothing here"),
        (["--to", "hf", "-o", "x", "--tp", "2"], "--tp means nothing here"),
        (["--to", "hf"], "--to hf has no destination"),
        (["--to", "hf", "-o", "x"], "is no workspace"),
        (["--dst-path", "model/inside"], "lie in one another"),
        (["--dst-path", "full"], "holds files that are no model"),
        (["--dst-path", "file"], "is a file"),
        (["--dst-path", "link"], "is a link"),
        (["--dst-path", "other"], "is there already; give another folder, or --overwrite"),
        (["--chat-template", "nobody"], "nobody"),
        (["--dst-path", "to model/inside"], "lie in one another"),
        (["--dst-path", "settings", "--overwrite"], "holds files that are no model"),
        (["--dst-path", "x" * 300], "file name too long"),
        (["--to", "hf", "-o", "x", "--download-dir", "y"], "--download-dir means nothing here"),
        (["--to", "hf", "-o", "x", "--dtype", "int8"], "--dtype is 'int8'"),
        (["--quant-path", "other", "--revision", "main"], "--revision main: MODEL is on this machine"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str],
    said: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    Path("settings").mkdir()
    Path("settings/config.json").write_text("{}")
    Path("file").write_text("x")
    Path("to model").symlink_to(model)
    Path("link").symlink_to("full")
    tiny_folder(Path("other"))
    before = contents(Path("other"))
    assert said.replace("MODEL", str(model)) in refused(capsys, "convert", model, *words)
    assert contents(Path("other")) == before
    assert contents(Path("full")) == {"letter.txt": b"dear"}
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".partial", ".old"))]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor(1.0), "model.norm.weight [] do not make [64]"),
        (torch.zeros(0), "model.norm.weight [0] do not make [64]"),
        (torch.ones(64, dtype=torch.int8), "model.norm.weight holds int8 numbers"),
        (torch.ones(64).to(torch.float8_e4m3fn), "model.norm.weight holds float8_e4m3fn numbers"),
    ],
)
def test_tensors_that_are_no_weights(
    tensor: torch.Tensor, said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_file(model / "model.safetensors") | {"model.norm.weight": tensor}, model / "model.safetensors")
    assert said in refused(capsys, "inspect", model)
    assert said in refused(capsys, "convert", model, "--dst-path", model.parent / "w")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_that_is_broken_itself(number: float, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = number
    save_file(tensors, model / "model.safetensors")
    for dtype in ("auto", "float16"):
        line = refused(capsys, "convert", model, "--dst-path", model.parent / "w", "--dtype", dtype)
        assert f"the logits of {model} are no numbers" in line


def test_a_workspace_is_not_written_over_or_into(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(workspace)
    layouts = (workspace, workspace / "triton_models/weights")
    for source in layouts:
        for place in (workspace, workspace / "hf", workspace.parent):
            line = refused(capsys, "convert", source, "--to", "hf", "-o", place, "--overwrite")
            assert "lie in one another" in line
        line = refused(capsys, "convert", source, "--to", "gguf", "-o", workspace / "x.gguf")
        assert "lie in one another" in line
    assert contents(workspace) == before


def test_numbers_that_float16_cannot_hold(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, model / "model.safetensors")
    destination = model.parent / "w"
    line = refused(capsys, "convert", model, "--dtype", "float16", "--dst-path", destination)
    assert "final_norm holds numbers that float16 cannot" in line
    assert not destination.exists()
    assert cli.main(["convert", str(model), "--dst-path", str(destination)]) == 0
    line = refused(capsys, "convert", destination, "--to", "hf", "-o", model.parent / "hf", "--dtype", "float16")
    assert "model.norm.weight holds numbers that float16 cannot" in line


def test_an_existing_workspace_is_replaced_only_when_asked(workspace: Path, model: Path) -> None:
    (workspace / "engine.toml").write_text("session_len = 64\n")
    old = contents(workspace)
    assert cli.main(["convert", str(model), "--dst-path", str(workspace)]) == 2
    assert contents(workspace) == old
    assert cli.main(["convert", str(model), "--dst-path", str(workspace), "--overwrite"]) == 0
    assert (workspace / "engine.toml").read_bytes() != old["engine.toml"]
    assert [path.name for path in workspace.parent.iterdir() if path.name.startswith(".")] == []


def test_two_at_once_do_not_mix(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = model.parent / ".w.partial"
    partial.mkdir()
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "another process is writing" in refused(capsys, "convert", model, "--dst-path", model.parent / "w")
    os.close(other)
    (partial / "left by one that was killed").write_text("x")
    assert cli.main(["convert", str(model), "--dst-path", str(model.parent / "w")]) == 0


# ---------------------------------------------------------------------- disks of other kinds


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)  # what a command has read may still be open there


def test_a_full_disk(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "large", hidden_size=256)
    old = tiny_folder(
        small_disk / "w", num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32
    )
    before = contents(old)
    line = refused(capsys, "convert", model, "--dst-path", old, "--overwrite")
    assert f"the disk of {old} is full" in line
    assert contents(old) == before
    assert [path.name for path in small_disk.iterdir()] == ["w"]


def test_a_destination_that_cannot_be_written(
    small_disk: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    line = refused(capsys, "convert", model, "--dst-path", small_disk / "w")
    assert "cannot be written: read-only file system" in line
    assert list(small_disk.iterdir()) == []
