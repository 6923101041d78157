"""The linears of a block that share an input, as one table on the shared decoder, and what a scale folds into.

input       matrix          made by                        scale folds into
qkv         q, k, v         attention norm                 the norm's weight
o           o               v, through attention           v's rows: one scale a key/value channel
gate_up     gate, up        MLP norm                       the norm's weight
down        down            silu(gate) · up                up's rows
"""

import torch
from torch import Tensor

from lmtool.layers.weights import Dense, Matrix
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import DecoderLayer

GROUPS = ("qkv", "o", "gate_up", "down")


def dense(matrix: Matrix) -> Dense:
    assert isinstance(matrix, Dense), "quantization starts from numbers, not from codes"
    return matrix


def matrix_of(layer: DecoderLayer, group: str) -> Dense:
    return dense(getattr(layer, group))


def sharing(config: ModelConfig, group: str) -> tuple[int, int] | None:
    """(key/value heads, query heads for each), where heads of a group must take one scale; else None."""
    if group != "o" or config.num_heads == config.num_kv_heads:
        return None
    return config.num_kv_heads, config.num_heads // config.num_kv_heads


def fold(layer: DecoderLayer, config: ModelConfig, group: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the group's columns by ``scale`` [K], divide what makes its input; the block's function stays.

    A norm is stored in ``dtype``: the scale is moved to what the rounded norm really divides by. The scale that was
    applied is returned.
    """
    matrix = matrix_of(layer, group)
    if group in ("qkv", "gate_up"):
        norm = layer.attention_norm if group == "qkv" else layer.mlp_norm
        divided = (norm / scale).to(dtype).float()
        scale = torch.where((norm == 0) | (divided == 0), torch.ones_like(scale), norm / divided)
        norm /= scale
    elif group == "o":
        size = config.num_kv_heads * config.head_dim
        per_channel = scale.view(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(size)
        qkv = dense(layer.qkv)
        qkv.weight[-size:] /= per_channel[:, None]
        if qkv.bias is not None:
            qkv.bias[-size:] /= per_channel
    else:
        dense(layer.gate_up).weight[config.intermediate_size :] /= scale[:, None]
    matrix.weight.mul_(scale)
    return scale
