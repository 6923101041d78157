"""How a matrix is stored. A matrix of the decoder is one of these; the decoder never learns which.

`Dense` holds numbers; `W4` 4-bit codes for a GPU; `Int4Cpu` 4-bit codes in torch's packed form. Knows no names and no
files.
"""

from typing import Protocol

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.kernels.cpu import multiplies_bfloat16


class Matrix(Protocol):
    """[N, K] and the four things a decoder does with it; x [T, K]."""

    def linear(self, x: Tensor) -> Tensor: ...
    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor: ...
    def norm_linear_silu(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor: ...
    def add_linear_(self, residual: Tensor, x: Tensor) -> Tensor: ...


class Dense:
    """weight [N, K] and bias [N] in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def linear(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        return kernels.norm_linear(x, norm_weight, eps, self.weight, self.bias)

    def norm_linear_silu(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        return kernels.norm_linear_silu(x, norm_weight, eps, self.weight)

    def add_linear_(self, residual: Tensor, x: Tensor) -> Tensor:
        return kernels.add_linear_(residual, x, self.weight, self.bias)


class W4:
    """4-bit codes with a scale and a zero point for each group along K, in the kernels' own tiles: for GPUs.

    ``order`` [K] int64: in feature order[k] of x meets column k of the codes (GPTQ's act-order); None: as they come.
    """

    def __init__(self, tiles: kernels.W4Tiles, bias: Tensor | None = None, order: Tensor | None = None) -> None:
        self.tiles = tiles
        self.bias = bias
        self._order = order

    def linear(self, x: Tensor) -> Tensor:
        return kernels.w4_linear(self._ordered(x), self.tiles, self.bias)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        # a norm does not mind in which order its row comes
        return kernels.norm_w4_linear(self._ordered(x), self._ordered(norm_weight), eps, self.tiles, self.bias)

    def norm_linear_silu(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        return kernels.norm_w4_linear_silu(self._ordered(x), self._ordered(norm_weight), eps, self.tiles)

    def add_linear_(self, residual: Tensor, x: Tensor) -> Tensor:
        return kernels.add_w4_linear_(residual, self._ordered(x), self.tiles, self.bias)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self._order is None else x.index_select(-1, self._order)


class _CpuCodes:
    """Shared by the CPU stores whose kernel multiplies bfloat16 rows.

    The residual stream stays float32; only what goes into and comes out of a product is bfloat16.
    """

    bias: Tensor | None

    def _product(self, x: Tensor) -> Tensor:
        """x [T, K] in any float dtype → [T, N], bfloat16 where the rows are few, else float32."""
        raise NotImplementedError

    def linear(self, x: Tensor) -> Tensor:
        y = self._product(x).float()
        return y if self.bias is None else y.add_(self.bias)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        return self.linear(kernels.rms_norm(x, norm_weight, eps))

    def norm_linear_silu(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        return kernels.silu_mul(self._product(kernels.rms_norm(x, norm_weight, eps)))

    def add_linear_(self, residual: Tensor, x: Tensor) -> Tensor:
        residual.add_(self._product(x))
        return residual if self.bias is None else residual.add_(self.bias)


class Int4Cpu(_CpuCodes):
    """4-bit codes in groups along K, w = code · scale + minimum: GGUF's Q4_0 and Q4_1, AWQ's, GPTQ's.

    Few rows go to torch's packed kernel (bfloat16 rows, bfloat16 scales: they lose 3 bits of mantissa, which is
    far below what 4 bits lost). Many rows are compute-bound: they go to a product with the weights expanded, in
    bfloat16 where the CPU multiplies it and else exactly, in float32; kept beside the codes where ``keep_dense``,
    else expanded for each call.
    """

    MAX_PACKED_ROWS = 48  # measured: docs/log.md, 2026-11-21, "CPU products by row count"
    PACKED_GROUPS = (32, 64, 128, 256)  # that torch's kernel takes

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        minimum: Tensor,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        *,
        keep_dense: bool = True,
    ) -> None:
        """codes [N, K] uint8 0..15; scale and minimum [N, K / group] float; bias [N].

        order [K] int64: in feature order[k] of x meets column k of the codes; None: as they come.
        """
        self.bias = bias
        self._order = order
        scale, minimum = scale.float(), minimum.float()
        longest = self.PACKED_GROUPS[-1]
        if (group := codes.shape[1] // scale.shape[1]) > longest and group % longest == 0:
            scale, minimum = (part.repeat_interleave(group // longest, dim=1) for part in (scale, minimum))
        self.group_size = codes.shape[1] // scale.shape[1]
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        # torch's form is (code - 8) · scale + zero
        pairs = torch.stack((scale, minimum + 8 * scale), dim=-1)
        self._scale_and_zero = pairs.transpose(0, 1).contiguous().bfloat16()
        self._dense_dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
        self._keep_dense = keep_dense
        self._dense: Tensor | None = None
        self._codes: tuple[Tensor, Tensor, Tensor] | None = (codes, scale, minimum)

    def _product(self, x: Tensor) -> Tensor:
        if self._order is not None:
            x = x.index_select(-1, self._order)
        if x.shape[0] <= self.MAX_PACKED_ROWS:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16(), self._packed, self.group_size, self._scale_and_zero
            )
        return kernels.linear(x.to(self._dense_dtype), self._expanded())

    def _expanded(self) -> Tensor:
        """Where it is kept, it is made for the first product of many rows: a third of the time of loading."""
        if self._dense is not None:
            return self._dense
        assert self._codes is not None
        dense = expand_int4(*self._codes).to(self._dense_dtype)
        if self._keep_dense:
            self._dense, self._codes = dense, None
        return dense


class Int8Cpu(_CpuCodes):
    """8-bit codes with a scale per output row, for the output head: the largest matrix of a small model.

    Few rows go to torch's kernel, which takes the codes as they are; many to a float32 product with the codes expanded,
    made for the first of them and kept, unless that is more than ``MOST_KEPT`` bytes.
    """

    MAX_PACKED_ROWS = (
        12  # measured, 49152 × 576: 8 rows 24 ms against 43, 16 rows 41 against 31, 64 rows 167 against 65
    )
    MOST_KEPT = 1 << 29

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        """codes [N, K] int8, scale [N] bfloat16, as `round_int8` makes them."""
        self.bias = None
        self._codes, self._scale = codes, scale
        self._dense: Tensor | None = None
        self._keeps_dense = codes.numel() * 4 <= self.MOST_KEPT

    def _product(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.MAX_PACKED_ROWS or not self._keeps_dense:
            return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self._codes, self._scale)
        if self._dense is None:
            self._dense = self._codes.float().mul_(self._scale.float()[:, None])
        return kernels.linear(x.float(), self._dense)


_PIECE = 1 << 18  # numbers


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] → codes int8 [N, K], -127..127, and a scale for each row, bfloat16 [N]: weight ≈ codes · scale."""
    all_codes = torch.empty(weight.shape, dtype=torch.int8)
    all_scales = torch.empty(weight.shape[0], dtype=torch.bfloat16)
    # a piece at a time: what is in the cache is read four times, what is in memory once
    step = max(1, _PIECE // weight.shape[1])
    pieces = (tensor.split(step) for tensor in (weight, all_codes, all_scales))
    for rows, codes, scale in zip(*pieces, strict=True):
        rows = rows.float()
        # torch's kernel has bfloat16 scales: codes are taken for the rounded ones, so that no row is off as a whole
        scale.copy_(rows.abs().amax(dim=1).clamp_min_(1e-12).div_(127))
        codes.copy_((rows / scale.float()[:, None]).round_().clamp_(-127, 127))
    return all_codes, all_scales


def expand_int4(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """codes [N, K] uint8, scale and minimum [N, K / group] → [N, K] float32."""
    grouped = codes.view(*scale.shape, -1).float()
    return grouped.mul_(scale[..., None]).add_(minimum[..., None]).flatten(1)
