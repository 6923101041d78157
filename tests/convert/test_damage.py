"""A damaged workspace: found before it is run, told in one line with the cause, exit code 2."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from lmtool.checkpoint.reader import tensor_starts
from tests.convert.test_refusals import refused
from tests.models.test_quantized import KINDS, quantize
from tests.quant.models import tiny_folder


def rewrite(workspace: Path, change: dict[str, object]) -> None:
    manifest = json.loads((workspace / "lmtool.json").read_text())
    (workspace / "lmtool.json").write_text(json.dumps(manifest | change))


def test_a_flipped_byte_is_found(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workspace / "weights-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[tensor_starts(file)["layers.1.down.weight"] + 100] ^= 4
    file.write_bytes(data)
    assert "layers.1.down.weight are not those that were written" in refused(capsys, "inspect", workspace)
    assert cli.main(["inspect", str(workspace), "--no-verify"]) == 0


def test_a_truncated_file_is_found(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workspace / "weights-00001.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    for command in (
        ("inspect", workspace),
        ("convert", workspace, "--to", "hf", "-o", "y"),
    ):
        assert "is corrupt or cut off" in refused(capsys, *command)


def test_a_missing_file_is_found(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "weights-00001.safetensors").unlink()
    assert "weights-00001.safetensors is missing" in refused(capsys, "inspect", workspace)


def test_a_wrong_dtype_is_found(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workspace / "weights-00001.safetensors"
    tensors = load_file(file)
    tensors["layers.0.o.weight"] = tensors["layers.0.o.weight"].to(torch.bfloat16)
    save_file(tensors, file)
    line = refused(capsys, "inspect", workspace)
    assert "layers.0.o.weight is bfloat16 [64, 64], lmtool.json says float32 [64, 64]" in line


def test_a_newer_format_is_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(workspace, {"format_version": 3, "something": "new"})
    line = refused(capsys, "inspect", workspace)
    assert "has format version 3, this lmtool reads up to 2" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": 5}, "is damaged"),
        ({"format_version": "one"}, "cannot be read"),
        ({"format_version": 0}, "its format version is 0"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"config": {"architectures": ["Nobody"]}}, "Nobody is not supported"),
        ({"weights": {}}, "tensors are missing"),
    ],
)
def test_a_damaged_manifest_is_told(
    change: dict[str, object], said: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(workspace, change)
    assert said in refused(capsys, "inspect", workspace)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("file", "../model/model.safetensors", "no file of its folder"),
        ("name", "layers.0...o", "a name is words between single dots"),
        ("dtype", "float16", "lmtool.json says float16"),
    ],
)
def test_a_manifest_leads_nowhere_else(
    key: str, value: str, said: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((workspace / "lmtool.json").read_text())
    manifest["weights"]["layers.0.o.weight"]["parts"]["values"][key] = value
    (workspace / "lmtool.json").write_text(json.dumps(manifest))
    assert said in refused(capsys, "inspect", workspace)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group_size": 64}, "and its tiles [4, 2, 640], not [4, 2, 576]"),
        ({"group_size": 128}, "has groups of 128 in (128, 64)"),
        ({"group_size": 10**30}, "has groups of 1000"),
        ({"shape": [-128, 64]}, "has groups of 32 in (-128, 64)"),
        ({"shape": [256, 64]}, "and its tiles [4, 2, 640], not [8, 2, 640]"),
        ({"shape": [128]}, "has groups of 32 in (128,)"),
    ],
)
def test_tiles_of_another_model_are_refused(
    change: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quantize(tiny_folder(tmp_path / "model", intermediate_size=128), **KINDS["awq"])
    assert cli.main(["convert", str(model), "--dst-path", str(tmp_path / "workspace"), "--no-check"]) == 0
    manifest = json.loads((tmp_path / "workspace/lmtool.json").read_text())
    manifest["weights"]["layers.0.qkv.weight"] |= change
    (tmp_path / "workspace/lmtool.json").write_text(json.dumps(manifest))
    for words in (["inspect"], ["convert", "--to", "hf", "-o", tmp_path / "x"]):
        assert said in refused(capsys, words[0], tmp_path / "workspace", *words[1:])


def test_a_workspace_without_its_tokenizer_is_damaged(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "tokenizer.json").unlink()
    assert f"{workspace} holds no tokenizer.json" in refused(capsys, "inspect", workspace)
