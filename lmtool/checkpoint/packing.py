"""4-bit codes in the int32 words of AWQ and GPTQ files, and back. Knows the bits, not the files that hold them.

Everywhere a matrix is [N, K]: N out features, K in features, in groups of g along K: w = (code - zero) · scale.
"""

import torch
from torch import Tensor

CODES_IN_WORD = 8
# AutoAWQ's GEMM format: nibble p of a word holds the column AWQ_ORDER[p] of its eight
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NATURAL_ORDER = tuple(range(CODES_IN_WORD))


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


def pack_gptq(codes: Tensor, scale: Tensor, zero: Tensor, *, offset: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """qweight int32 [K/8, N], qzeros int32 [K/g, N/8], scales float16 [K/g, N], as AutoGPTQ writes 4 bits.

    The first version of the format stores zero - 1 (``offset`` 1), gptq_v2 stores zero (``offset`` 0).
    """
    qweight = _pack_columns(codes, _NATURAL_ORDER).t().contiguous()
    stored = (zero.t().to(torch.int16) - offset).bitwise_and(15).to(torch.uint8)
    return qweight, _pack_columns(stored, _NATURAL_ORDER), scale.t().to(torch.float16).contiguous()


def unpack_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, offset: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_gptq`. Columns are left in the file's order: g_idx says which group each belongs to."""
    codes = _unpack_columns(qweight.t(), _NATURAL_ORDER)
    stored = _unpack_columns(qzeros, _NATURAL_ORDER).t()
    zero = (stored.to(torch.int16) + offset).bitwise_and(15).to(torch.uint8)
    return codes.contiguous(), scales.t().contiguous(), zero.contiguous()


def unpack_gptq8(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, offset: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """As `unpack_gptq` of 8-bit codes, four in a word: codes uint8 [N, K], scale [N, K/g], zero uint8 [N, K/g]."""
    codes = _bytes(qweight.t())
    zero = (_bytes(qzeros).t().to(torch.int16) + offset).bitwise_and(255).to(torch.uint8)
    return codes.contiguous(), scales.t().contiguous(), zero.contiguous()


def _bytes(words: Tensor) -> Tensor:
    """int32 [R, C] → uint8 [R, 4·C], the lowest byte first."""
    return torch.stack([(words >> (8 * i)).bitwise_and(255).to(torch.uint8) for i in range(4)], dim=-1).flatten(1)


def _pack_columns(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """values [R, C] 0..15 → int32 [R, C/8]: nibble p of word c is the value of column 8·c + order[p]."""
    eights = values.reshape(values.shape[0], -1, CODES_IN_WORD).to(torch.int32)
    words = torch.zeros(eights.shape[:2], dtype=torch.int32, device=values.device)
    for nibble, column in enumerate(order):
        words |= eights[..., column] << (4 * nibble)
    return words


def _unpack_columns(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_pack_columns`: uint8 [R, C]."""
    values = torch.empty((*words.shape, CODES_IN_WORD), dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(order):
        values[..., column] = (words >> (4 * nibble)).bitwise_and(15).to(torch.uint8)
    return values.flatten(1)
