"""Folders that are written: shards that the reader takes, and nothing half there."""

from pathlib import Path

import pytest
import torch

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.writer import write_json, write_shards, write_tensors

TENSORS = {f"t{i}": torch.randn(10, 10) for i in range(5)}


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(1 << 20, 1), (900, 3), (1, 5)])
def test_shards(tmp_path: Path, shard_bytes: int, num_files: int) -> None:
    sizes = {name: tensor.nbytes for name, tensor in TENSORS.items()}
    names = write_shards(tmp_path, sizes, TENSORS.__getitem__, shard_bytes)
    assert len([name for name in names if name.endswith(".safetensors")]) == num_files
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(TENSORS)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in TENSORS.items())


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(NotImplementedError, match="meta"):
        write_tensors(path, {"a": torch.ones(3, device="meta")})
    assert path.read_bytes() == before
