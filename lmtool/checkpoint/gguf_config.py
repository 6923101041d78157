"""GGUF metadata and tensor names in Hugging Face's words.

Source: the key and tensor names of ggml's docs/gguf.md and of llama.cpp's converter. Does not read tensors' data
except the small `rope_freqs.weight`, which HF keeps in its configuration.
"""

import re
from math import pi
from typing import Any

import numpy as np

from lmtool.checkpoint.gguf_file import GgufFile
from lmtool.errors import CheckpointError

# InternLM2 is a Llama once llama.cpp's converter has split its wqkv
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "internlm2": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
# rows of q and k are stored in the order of interleaved rotary pairs
INTERLEAVED_ROPE = ("llama", "internlm2")
ROPE_FREQS = "rope_freqs.weight"

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'; an unknown name stays as it is."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{block[3]}"
    stem, _, suffix = name.rpartition(".")
    return f"{TOP_NAMES[stem]}.{suffix}" if stem in TOP_NAMES else name


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{file.path} holds architecture {self.architecture!r}",
                "take a GGUF file of " + ", ".join(ARCHITECTURES),
            )

    def get(self, kind: type, key: str) -> Any:
        """The value, or None where the file has no such key."""
        key = f"{self.architecture}.{key}"
        value = self.file.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(
                f"{self.file.path}: {key} is a {type(value).__name__}, not a {kind.__name__}",
                "take a file made by llama.cpp's converter",
            )
        return value

    def need(self, kind: type, key: str) -> Any:
        value = self.get(kind, key)
        if value is None:
            raise CheckpointError(
                f"{self.file.path} lacks {self.architecture}.{key}", "take a file made by llama.cpp's converter"
            )
        return value


def hf_config(file: GgufFile) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError for what the engine's models cannot express."""
    meta = _Metadata(file)
    num_parts = file.metadata.get("split.count", 1)
    if num_parts > 1:
        raise CheckpointError(
            f"{file.path} is one of {num_parts} parts", "join them with llama.cpp's llama-gguf-split --merge"
        )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} holds no token_embd.weight", "give a file with the whole model")
    architecture, model_type = ARCHITECTURES[meta.architecture]
    num_heads = meta.need(int, "attention.head_count")
    hidden_size = meta.need(int, "embedding_length")
    head_dim = meta.get(int, "attention.key_length") or hidden_size // num_heads
    _refuse_unsupported(meta, head_dim)
    window = meta.get(int, "attention.sliding_window")
    if window and meta.architecture == "llama":
        architecture, model_type = "MistralForCausalLM", "mistral"  # HF's Llama has no window
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": meta.need(int, "feed_forward_length"),
        "num_hidden_layers": meta.need(int, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.get(int, "attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(meta.need(float, "attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(meta.get(float, "rope.freq_base") or 10000.0),
        "rope_scaling": _rope_scaling(meta, head_dim),
        "max_position_embeddings": meta.need(int, "context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True}
    return config


def _decimal(value: float) -> float:
    """The decimal that was meant: float32 1e-5 read as a double is 9.99999974e-06."""
    return float(str(np.float32(value)))


def _refuse_unsupported(meta: _Metadata, head_dim: int) -> None:
    if meta.get(int, "expert_count"):
        raise CheckpointError(f"{meta.file.path} is a mixture of experts", "take a dense model")
    value_length = meta.get(int, "attention.value_length") or head_dim
    rotary_dim = meta.get(int, "rope.dimension_count") or head_dim
    for what, size in (("attention.value_length", value_length), ("rope.dimension_count", rotary_dim)):
        if size != head_dim:
            raise CheckpointError(
                f"{meta.file.path}: {what} is {size} and the head has {head_dim}", "take a model where they are equal"
            )


def _rope_scaling(meta: _Metadata, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FREQS in meta.file.tensors:
        return _llama3_scaling(meta, head_dim)
    kind = meta.get(str, "rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _decimal(meta.need(float, "rope.scaling.factor"))}
    raise CheckpointError(
        f"{meta.file.path} needs rope scaling {kind!r}", "take the model as safetensors, or one with linear or llama3"
    )


def _llama3_scaling(meta: _Metadata, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling from its table of divisors, proved by computing the table again.

    The converter writes the divisors only; the other three values are those of every published Llama 3.1 and 3.2.
    """
    entry = meta.file.tensors[ROPE_FREQS]
    if entry.type.name != "float32" or entry.shape != (head_dim // 2,):
        raise CheckpointError(f"{meta.file.path}: {ROPE_FREQS} is {entry.type.name} {entry.shape}")
    stored = meta.file.blocks(ROPE_FREQS).view(np.float32).reshape(-1)
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = meta.get(float, "rope.freq_base") or 10000.0
    if not np.allclose(stored, llama3_divisors(scaling, theta, head_dim), rtol=1e-4):
        raise CheckpointError(
            f"{meta.file.path}: {ROPE_FREQS} is not Llama 3's scaling", "take the model as safetensors"
        )
    return scaling


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray[Any, Any]:
    """[head_dim / 2]: by how much each rotary frequency is divided (Llama 3.1's published formula)."""
    wavelength = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = smooth.clip(0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
