"""HF folders: shards, laziness, and one clear line for everything that can be wrong with a folder."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.errors import CheckpointError

TENSORS = {
    "model.embed_tokens.weight": torch.arange(32, dtype=torch.float32).view(8, 4),
    "model.norm.weight": torch.ones(4, dtype=torch.bfloat16),
    "lm_head.weight": torch.arange(32, dtype=torch.float16).view(8, 4),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def single(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def sharded(folder: Path, index: bool = True) -> Path:
    names = list(TENSORS)
    parts = {SHARDS[0]: names[:2], SHARDS[1]: names[2:]}
    for file, part in parts.items():
        save_file({name: TENSORS[name] for name in part}, folder / file)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    if index:
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "build", [single, sharded, lambda folder: sharded(folder, index=False)], ids=["single", "index", "several"]
)
def test_every_layout_reads_the_same(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    checkpoint = open_checkpoint(build(tmp_path))
    assert checkpoint.format == "hf"
    assert set(checkpoint.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.packed_int4(name) is None
    assert checkpoint.dtype("model.norm.weight") == "bfloat16"
    assert checkpoint.generation_config == {}
    kept = checkpoint.tensor("lm_head.weight")
    checkpoint.close()
    assert kept.sum() == TENSORS["lm_head.weight"].sum()


def test_generation_config_is_read(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [1, 2]}


def header(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


def damage(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    match what:
        case "cut":
            weights.write_bytes(whole[:-10])
        case "empty":
            weights.write_bytes(b"")
        case "bad json":
            weights.write_bytes(header(b"{nonsense"))
        case "long header":
            weights.write_bytes(header(b"{}", 2**50))
        case "offsets":
            entry = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]}}
            weights.write_bytes(header(json.dumps(entry).encode()) + bytes(16))
        case "lfs":
            weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", "is corrupt or cut off"),
        ("empty", "is corrupt or cut off"),
        ("bad json", "is corrupt or cut off"),
        ("long header", "is corrupt or cut off"),
        ("offsets", "is corrupt or cut off"),
        ("lfs", "is a Git LFS pointer"),
    ],
)
def test_broken_weights_are_named(tmp_path: Path, what: str, message: str) -> None:
    damage(single(tmp_path), what)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "is empty" in refused(tmp_path)
    sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert f"lacks 1 of 2 weight files: {SHARDS[1]}" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "blob.incomplete").touch()
    message = refused(tmp_path)
    assert f"lacks 1 of 2 weight files: {SHARDS[1]} (an unfinished download is beside it)" in message
    (tmp_path / SHARDS[0]).unlink()
    assert "only an unfinished download" in refused(tmp_path)


def test_configuration_must_be_there_and_json(tmp_path: Path) -> None:
    single(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    assert f"{config} cannot be read as JSON" in refused(tmp_path)
    config.write_text("[1]")
    assert "holds a JSON list, not an object" in refused(tmp_path)
    config.unlink()
    assert f"{config} is missing" in refused(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", 3, ".."])
def test_an_index_may_name_only_safetensors_of_its_folder(tmp_path: Path, file: object) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "is not a safetensors file of this folder" in refused(tmp_path)


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {"model.extra": SHARDS[0]}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "disagree on 1 tensors, such as model.extra" in refused(tmp_path)
    index.write_text("{}")
    assert "holds no weight_map" in refused(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "is in both a.safetensors and b.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_refused_with_the_command_that_converts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    (tmp_path / "config.json").write_text("{}")
    assert f"lmtool convert {tmp_path} --allow-bin" in refused(tmp_path)
    assert f"lmtool convert {tmp_path} --allow-bin" in refused(tmp_path / name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert f"give the file itself, as in {tmp_path / 'model.gguf'}" in refused(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "neither a folder nor a .gguf file" in refused(tmp_path / "notes.txt")
    assert "holds no tensor" in unknown_tensor(tmp_path / "whole")


def unknown_tensor(folder: Path) -> str:
    folder.mkdir()
    checkpoint = open_checkpoint(single(folder))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor("model.nothing")
    return str(caught.value)
