"""Logits of every architecture against transformers: tiny random weights, float32, assert_close's own tolerance.

InternLM 1/2 and Qwen 1 have no class in transformers: their checkpoints are rewritten here from an equivalent
Llama or Qwen2 by transforms that share nothing with lmtool's.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lmtool.checkpoint.formats import open_checkpoint
from lmtool.models.decoder import Decoder
from lmtool.models.loader import load_decoder, read_model_config
from tests.support import all_logits

NUM_TOKENS = 70  # more than a block of 64
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True}),
    "llama head dim": ("Llama", {"head_dim": 32}),
    "llama no groups": ("Llama", {"num_key_value_heads": 4}),
    "llama rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama rope llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 32, "use_sliding_window": False}),
}


def hf_model(name: str, **difference: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**(SIZES | difference))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # large enough that a swapped matrix changes every logit; biases not zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def load(folder: Path, num_positions: int = NUM_TOKENS) -> Decoder:
    checkpoint = open_checkpoint(folder)
    config = read_model_config(checkpoint.config)
    return load_decoder(
        checkpoint, config, dtype=torch.float32, device=torch.device("cpu"), num_positions=num_positions
    )


def check_logits(model: Any, folder: Path, num_tokens: int = NUM_TOKENS) -> None:
    ids = torch.randint(0, SIZES["vocab_size"], (num_tokens,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    decoder = load(folder, num_tokens)
    torch.testing.assert_close(all_logits(decoder, ids.tolist()), expected)
    torch.testing.assert_close(all_logits(decoder, ids.tolist(), num_prefill=num_tokens - 8), expected)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    name, difference = CASES[case]
    model = hf_model(name, **difference)
    model.save_pretrained(tmp_path)
    check_logits(model, tmp_path)


@pytest.mark.parametrize("num_tokens", [40, 70])
def test_dynamic_rope_equals_transformers_at_the_context_it_is_built_for(num_tokens: int, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = hf_model("Llama", rope_parameters=rope, max_position_embeddings=48)
    model.save_pretrained(tmp_path)
    ids = torch.arange(num_tokens) % SIZES["vocab_size"]
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(all_logits(load(tmp_path, num_tokens), ids.tolist()), expected)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_internlm(tmp_path: Path) -> None:
    model = hf_model("Llama", attention_bias=True, num_key_value_heads=4)
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    config = sizes | {
        "architectures": ["InternLMForCausalLM"],
        "bias": True,
        "rotary": {"base": 10000, "type": "dynamic"},
    }
    write(tmp_path, config, dict(model.state_dict()))
    check_logits(model, tmp_path)


def test_internlm2(tmp_path: Path) -> None:
    model = hf_model("Llama")
    d, groups = 16, SIZES["num_key_value_heads"]
    tensors: dict[str, torch.Tensor] = {}
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if "q_proj" in name:
            k, v = state[name.replace("q_proj", "k_proj")], state[name.replace("q_proj", "v_proj")]
            rows = []
            for g in range(groups):
                rows += [tensor[g * 2 * d : (g + 1) * 2 * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
            tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in (
                ("self_attn.o_proj", "attention.wo"),
                ("mlp.gate_proj", "feed_forward.w1"),
                ("mlp.up_proj", "feed_forward.w3"),
                ("mlp.down_proj", "feed_forward.w2"),
                ("input_layernorm", "attention_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("embed_tokens", "tok_embeddings"),
                ("lm_head", "output"),
            ):
                name = name.replace(old, new)
            tensors[name] = tensor
    config = SIZES | {"architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 10000}
    write(tmp_path, config, tensors)
    check_logits(model, tmp_path)


def test_qwen1(tmp_path: Path) -> None:
    model = hf_model("Qwen2", num_key_value_heads=4, use_sliding_window=False)
    state = dict(model.state_dict())
    tensors = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for i in range(SIZES["num_hidden_layers"]):
        old, new = f"model.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{new}attn.c_attn.{kind}"] = torch.cat(parts)
        tensors[f"{new}attn.c_proj.weight"] = state[f"{old}self_attn.o_proj.weight"]
        tensors[f"{new}mlp.w1.weight"] = state[f"{old}mlp.up_proj.weight"]
        tensors[f"{new}mlp.w2.weight"] = state[f"{old}mlp.gate_proj.weight"]
        tensors[f"{new}mlp.c_proj.weight"] = state[f"{old}mlp.down_proj.weight"]
        tensors[f"{new}ln_1.weight"] = state[f"{old}input_layernorm.weight"]
        tensors[f"{new}ln_2.weight"] = state[f"{old}post_attention_layernorm.weight"]
    config = {
        "architectures": ["QWenLMHeadModel"],
        "vocab_size": SIZES["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 2 * 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-5,
        "seq_length": 128,
        "max_position_embeddings": 256,
        "rotary_emb_base": 10000,
    }
    write(tmp_path, config, tensors)
    check_logits(model, tmp_path)
