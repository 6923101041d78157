"""What a wrong checkpoint is told: every missing and unexpected tensor at once, wrong shapes, unknown families."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool.errors import CheckpointError
from lmtool.models.loader import read_model_config
from tests.models.test_against_hf import hf_model, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_model("Llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_unexpected_names_are_reported_together(folder: Path) -> None:
    gone = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    rewrite(folder, {gone[0]: None, gone[1]: None, "model.layers.0.extra": torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "2 tensors are missing" in message
    assert "1 are unexpected" in message
    assert all(name in message for name in [*gone, "model.layers.0.extra"])
    assert "\n" not in message


def test_left_over_rotary_tables_are_not_unexpected(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(folder)


def test_wrong_shape_names_the_tensor(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.mlp.down_proj.weight": torch.ones(64, 95)})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight \[64, 95\] do not make \[64, 96\]"):
        load(folder)


def test_codes_are_not_taken_for_weights(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.mlp.down_proj.weight": torch.ones(64, 96, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds int8 numbers; codes of a quantized model"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: InternLM2ForCausalLM"),
        ({"architectures": []}, "names no architecture"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads and 3 key/value heads"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn' is not supported"),
        ({"hidden_act": "gelu"}, "only silu is supported"),
    ],
)
def test_a_config_that_cannot_be_run(folder: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=message):
        read_model_config(config)
