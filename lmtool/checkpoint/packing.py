"""4- and 8-bit codes in the int32 words of AWQ and GPTQ files, and back. Knows the bits, not the files that hold them.

Everywhere a matrix is [N, K]: N out features, K in features, in groups of g along K: w = (code - zero) · scale.
"""

import torch
from torch import Tensor

_WORD_BITS = 32
# AutoAWQ's GEMM format: nibble p of a word holds the column AWQ_ORDER[p] of its eight
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# GPTQ's: fields of a word in the order of what they hold, from the lowest bit
_IN_ORDER = {4: tuple(range(8)), 8: tuple(range(4))}


def pack_awq(codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales float16 [K/g, N], as AutoAWQ's GEMM format has them.

    codes uint8 [N, K] and zero uint8 [N, K/g], values 0..15; scale [N, K/g]; 8 divides N.
    """
    qweight = _pack_columns(codes.t(), AWQ_ORDER)
    return qweight, _pack_columns(zero.t(), AWQ_ORDER), scale.t().to(torch.float16).contiguous()


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_awq`: codes uint8 [N, K], scale [N, K/g] in the dtype of ``scales``, zero uint8 [N, K/g]."""
    codes = _unpack_columns(qweight, AWQ_ORDER).t()
    zero = _unpack_columns(qzeros, AWQ_ORDER).t()
    return codes.contiguous(), scales.t().contiguous(), zero.contiguous()


def pack_gptq(
    codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int = 4, offset: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """qweight int32 [K·b/32, N], qzeros int32 [K/g, N·b/32], scales float16 [K/g, N], as AutoGPTQ has them; b 4 or 8.

    codes uint8 [N, K] and zero uint8 [N, K/g]; 32/b divides N and K. The first version of the format stores zero - 1
    (``offset`` 1), gptq_v2 stores zero (``offset`` 0).
    """
    qweight = _pack_columns(codes, _IN_ORDER[bits]).t().contiguous()
    stored = (zero.t().to(torch.int16) - offset).bitwise_and((1 << bits) - 1).to(torch.uint8)
    return qweight, _pack_columns(stored, _IN_ORDER[bits]), scale.t().to(torch.float16).contiguous()


def unpack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int = 4, offset: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_gptq`. Columns are left in the file's order: g_idx says which group each belongs to."""
    codes = _unpack_columns(qweight.t(), _IN_ORDER[bits])
    stored = _unpack_columns(qzeros, _IN_ORDER[bits]).t()
    zero = (stored.to(torch.int16) + offset).bitwise_and((1 << bits) - 1).to(torch.uint8)
    return codes.contiguous(), scales.t().contiguous(), zero.contiguous()


def _pack_columns(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """values uint8 [R, C] → int32 [R, C/n], n = len(order): field p of word c is the value of column n·c + order[p]."""
    bits = _WORD_BITS // len(order)
    together = values.reshape(values.shape[0], -1, len(order)).to(torch.int32)
    words = torch.zeros(together.shape[:2], dtype=torch.int32, device=values.device)
    for field, column in enumerate(order):
        words |= together[..., column] << (bits * field)
    return words


def _unpack_columns(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_pack_columns`: uint8 [R, C]."""
    bits = _WORD_BITS // len(order)
    values = torch.empty((*words.shape, len(order)), dtype=torch.uint8, device=words.device)
    for field, column in enumerate(order):
        values[..., column] = (words >> (bits * field)).bitwise_and((1 << bits) - 1).to(torch.uint8)
    return values.flatten(1)
