"""Small GGUF files for tests, written by the `gguf` package: an independent writer for our reader."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

LLAMA = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of a Llama: half-split rotary order to pairs."""
    out = np.empty_like(rows)
    head_dim = rows.shape[0] // num_heads
    for head in range(num_heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = rows[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = rows[head * head_dim + head_dim // 2 + i]
    return out


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]],
    metadata: dict[str, Any] | None = None,
    architecture: str = "llama",
    tokens: list[str] | None = None,
) -> Path:
    """Arrays are float32 and quantized here, or uint8 and stored as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (LLAMA | (metadata or {})).items():
        if value is None:
            continue
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        name = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        kind[type(value)](name, value)
    if tokens:
        writer.add_token_list(tokens)
    for name, (array, kind) in tensors.items():
        stored = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """GGUF name -> float32, in HF's order of rows."""
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (40, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
