"""The bytes of ggml's blocks of 32 codes, to codes and back: Q8_0, Q4_0, Q4_1. In numpy, as files are read.

Source: ggml's block_q8_0, block_q4_0 and block_q4_1.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtool.checkpoint.formats import PackedInt4, PackedInt8

BLOCK = 32


def unpack_int8(blocks: np.ndarray[Any, np.dtype[np.uint8]]) -> PackedInt8:
    """A block is a float16 scale and 32 codes (ggml's block_q8_0)."""
    num_rows = blocks.shape[0]
    block = blocks.reshape(num_rows, -1, 34)
    codes = np.ascontiguousarray(block[..., 2:]).view(np.int8).reshape(num_rows, -1)
    scale = np.ascontiguousarray(block[..., :2]).view(np.float16).reshape(num_rows, -1)
    return PackedInt8(torch.from_numpy(codes), torch.from_numpy(scale))


def unpack_int4(
    blocks: np.ndarray[Any, np.dtype[np.uint8]], kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes uint8 [N, K], scale and minimum float32 [N, K / 32].

    A block is float16 scale, for q4_1 float16 minimum, then 16 bytes: byte i holds code i in its low half and
    code i + 16 in its high half (ggml's block_q4_0 and block_q4_1). In numpy: torch's threads cost more than
    they win on 210 small matrices where another process has a core.
    """
    header = 4 if kind == "q4_1" else 2
    num_rows = blocks.shape[0]
    block = blocks.reshape(num_rows, -1, header + 16)
    nibbles = block[..., header:]
    codes = np.empty((*block.shape[:2], 32), np.uint8)
    np.bitwise_and(nibbles, 15, out=codes[..., :16])
    np.right_shift(nibbles, 4, out=codes[..., 16:])
    halves = np.ascontiguousarray(block[..., :header]).view(np.float16).astype(np.float32)
    scale = np.ascontiguousarray(halves[..., 0])
    minimum = np.ascontiguousarray(halves[..., 1]) if kind == "q4_1" else scale * np.float32(-8)
    return torch.from_numpy(codes.reshape(num_rows, -1)), torch.from_numpy(scale), torch.from_numpy(minimum)


def q8_0_blocks(packed: PackedInt8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The inverse of `unpack_int8`: [N, bytes of a row]. Longer groups are told once a block; scales become float16."""
    num_rows, num_in = packed.codes.shape
    scale = _each_block(packed.scale, num_in)
    codes = packed.codes.contiguous().view(torch.uint8).numpy().reshape(num_rows, -1, BLOCK)
    return np.concatenate((scale, codes), axis=2).reshape(num_rows, -1)


def q4_1_blocks(packed: PackedInt4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The inverse of `unpack_int4`: codes with minimums, [N, bytes of a row]; scale and minimum become float16."""
    num_rows, num_in = packed.codes.shape
    scale, minimum = _each_block(packed.scale, num_in), _each_block(packed.lowest, num_in)
    codes = packed.codes.contiguous().numpy().reshape(num_rows, -1, 2, BLOCK // 2)
    nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
    return np.concatenate((scale, minimum, nibbles), axis=2).reshape(num_rows, -1)


def _each_block(values: Tensor, num_in: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[N, groups] → the two bytes of a float16 for each block [N, blocks, 2]."""
    halves = values.to(torch.float16).repeat_interleave(num_in // values.shape[1] // BLOCK, dim=1)
    return halves.contiguous().numpy().view(np.uint8).reshape(len(halves), -1, 2)
