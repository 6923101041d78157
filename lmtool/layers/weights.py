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
        self._dense = expand_int4(codes, scale, minimum).to(self._dense_dtype) if keep_dense else None
        self._codes = None if keep_dense else (codes, scale, minimum)

    def _product(self, x: Tensor) -> Tensor:
        if self._order is not None:
            x = x.index_select(-1, self._order)
        if x.shape[0] <= self.MAX_PACKED_ROWS:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16(), self._packed, self.group_size, self._scale_and_zero
            )
        dense = self._dense
        if dense is None:
            assert self._codes is not None
            dense = expand_int4(*self._codes).to(self._dense_dtype)
        return kernels.linear(x.to(self._dense_dtype), dense)


class Int8Cpu(_CpuCodes):
    """8-bit codes with a scale per output row, for the output head: the largest matrix of a small model."""

    def __init__(self, weight: Tensor) -> None:
        """weight [N, K] float32, rounded to 8 bits here."""
        self.bias = None
        # the kernel's scales are bfloat16: codes are taken for the rounded ones, so that no row is off as a whole
        self._scale = (weight.abs().amax(dim=1).clamp_min(1e-12) / 127).bfloat16()
        self._codes = torch.round(weight / self._scale.float()[:, None]).clamp_(-127, 127).to(torch.int8)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self._codes, self._scale)


def expand_int4(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """codes [N, K] uint8, scale and minimum [N, K / group] → [N, K] float32."""
    grouped = codes.view(*scale.shape, -1).float()
    return grouped.mul_(scale[..., None]).add_(minimum[..., None]).flatten(1)
