"""The way of tensors through buffers, on a CPU: every number arrives, cast as torch casts it, or the file is named."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmtool.checkpoint.reader import HfCheckpoint
from lmtool.checkpoint.staging import Stager, StoredTensor
from lmtool.errors import CheckpointError
from lmtool.models import internlm2
from lmtool.models.decoder import Decoder
from lmtool.models.loader import Source, read_model_config
from lmtool.models.registry import family
from tests.models.test_against_hf import SIZES, hf_model, load

CPU = torch.device("cpu")


@pytest.fixture
def stager() -> Iterator[Stager]:
    """Pieces so small that every tensor here takes many, and more of them than there are buffers."""
    with Stager(CPU, piece_bytes=256, num_readers=3) as made:
        yield made


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> HfCheckpoint:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return HfCheckpoint(path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_arrives(tmp_path: Path, stager: Stager, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(37, 53).to(stored),
        "odd": torch.randn(3).to(stored),
        "b": torch.randn(64, 32).to(stored),
    }
    checkpoint = folder_of(tmp_path, tensors)
    filled = {name: torch.full(tensor.shape, torch.nan, dtype=wanted) for name, tensor in tensors.items()}
    for name, out in filled.items():
        found = checkpoint.stored(name)
        assert found is not None
        assert found.dtype == stored
        stager.fill(out, found)
    stager.wait()
    for name, tensor in tensors.items():
        assert torch.equal(filled[name], tensor.to(wanted)), name


def test_a_file_that_became_shorter_is_named(tmp_path: Path, stager: Stager) -> None:
    checkpoint = folder_of(tmp_path, {"a": torch.randn(64, 64)})
    found = checkpoint.stored("a")
    assert found is not None
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: it ends at byte 5000"):
        fill_often(stager, found)


def fill_often(stager: Stager, stored: StoredTensor) -> None:
    """More than may be under way at once: the error comes out of a later `fill`."""
    for _ in range(20):
        stager.fill(torch.empty(64, 64), stored)


def test_a_file_that_is_gone_is_named(tmp_path: Path, stager: Stager) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        stager.fill(torch.empty(4), StoredTensor(tmp_path / "gone.safetensors", 0, (4,), torch.float32))


def tensors_of(decoder: Decoder) -> list[torch.Tensor]:
    found = [decoder.embed, decoder.final_norm, decoder.head.weight]  # type: ignore[attr-defined]
    for layer in decoder.layers:
        found += [layer.attention_norm, layer.mlp_norm]
        found += [tensor for tensor in (layer.q_norm, layer.k_norm) if tensor is not None]
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            found.append(matrix.weight)  # type: ignore[attr-defined]
            found += [matrix.bias] if matrix.bias is not None else []  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_a_staged_decoder_is_the_plain_one(tmp_path: Path, stager: Stager, kind: str) -> None:
    hf_model(kind).save_pretrained(tmp_path)
    check_staged(tmp_path, stager)


def test_rows_are_put_in_order_after_they_arrived(tmp_path: Path, stager: Stager) -> None:
    config = SIZES | {"architectures": ["InternLM2ForCausalLM"], "bias": True, "rope_theta": 10000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model_config(config)
    shape_of = Source(None, model, internlm2, torch.float32, CPU).shape  # type: ignore[arg-type]
    tensors = {}
    for ours, (first, *others) in internlm2.NAMES.items():
        rows, *columns = shape_of(ours)
        for name in (first, *others):
            for i in range(2 if "{i}" in ours else 1):
                tensors[name.format(i=i)] = torch.randn(rows // (1 + len(others)), *columns)
    save_file(tensors, tmp_path / "model.safetensors")
    check_staged(tmp_path, stager)


def check_staged(folder: Path, stager: Stager) -> None:
    checkpoint = HfCheckpoint(folder)
    config = read_model_config(checkpoint.config)
    source = Source(checkpoint, config, family(checkpoint.config), torch.float32, CPU, False, stager)
    staged = tensors_of(source.decoder(64))
    source.finish()
    plain = tensors_of(load(folder))
    assert len(plain) == len(staged)
    assert all(torch.equal(a, b) for a, b in zip(plain, staged, strict=True))
