"""What `lmtool inspect` says of memory, and of what a stranger wrote into a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from lmtool.convert.inspection import inspect
from tests.convert.test_refusals import refused
from tests.models.test_quantized import quantize
from tests.quant.models import tiny_folder

# of a layer of hidden 64, MLP 128, 4 heads of 16, 2 for keys and values: float16, and tiles of 640 words of 4 bytes
MATRICES = ((128, 64), (64, 64), (256, 64), (64, 128))
DENSE = sum(2 * num_out * num_in for num_out, num_in in MATRICES)
TILES = sum(num_out // 32 * 2 * 640 * 4 for num_out, _ in MATRICES)
EMBED, NORMS = 2 * 341 * 64, 2 * 64


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return quantize(tiny_folder(tmp_path / "q", intermediate_size=128), "awq")


def weights(folder: Path) -> int:
    return inspect(folder).memory.weights


def test_every_layer_is_counted_as_it_is_stored(quantized: Path) -> None:
    assert weights(quantized) == EMBED + NORMS + 3 * (TILES + 2 * NORMS)
    dense = load_file(quantized / "dense/model.safetensors")
    tensors = load_file(quantized / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    mixed |= {name: tensor for name, tensor in dense.items() if ".layers.2." in name}
    save_file(mixed, quantized / "model.safetensors")
    assert weights(quantized) == EMBED + NORMS + 2 * TILES + DENSE + 3 * 2 * NORMS


def test_a_tied_head_with_codes_of_its_own_is_counted(quantized: Path) -> None:
    before = weights(quantized)
    tensors = load_file(quantized / "model.safetensors")
    tensors["lm_head.codes"] = torch.ones(341, 64, dtype=torch.int8)
    tensors["lm_head.scale"] = torch.ones(341, dtype=torch.bfloat16)
    save_file(tensors, quantized / "model.safetensors")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["head_bits"] = 8
    (quantized / "config.json").write_text(json.dumps(config))
    assert weights(quantized) == before + EMBED


def test_a_checkpoint_does_not_drive_the_terminal(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"eos_token": "<|im_end|>", "chat_template": "\x1b]0;title\x07{{ messages }}"}
    (quantized / "tokenizer_config.json").write_text(json.dumps(settings))
    assert cli.main(["inspect", str(quantized)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "{{ messages }}" in said


@pytest.mark.parametrize("context", ["0", "-1"])
def test_no_context_at_all_is_refused(context: str, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--context {context}" in refused(capsys, "inspect", quantized, "--context", context)
