"""Products with 4-bit weights, plain torch: the weights are expanded and rounded to the dtype of x."""

import torch
from torch import Tensor

from lmtool.kernels.reference import linear
from lmtool.kernels.w4_layout import W4Tiles, unpack_w4


def w4_expand(weight: W4Tiles, dtype: torch.dtype) -> Tensor:
    codes, scale, zero = unpack_w4(weight)
    grouped = codes.view(*scale.shape, -1).to(torch.float32) - zero[..., None].to(torch.float32)
    return (grouped * scale[..., None].to(torch.float32)).flatten(1).to(dtype)


def w4_linear(x: Tensor, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    return linear.linear(x, w4_expand(weight, x.dtype), bias)


def norm_w4_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    return linear.norm_linear(x, norm_weight, eps, w4_expand(weight, x.dtype), bias)


def norm_w4_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: W4Tiles) -> Tensor:
    return linear.norm_linear_silu(x, norm_weight, eps, w4_expand(weight, x.dtype))


def add_w4_linear_(residual: Tensor, x: Tensor, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    return linear.add_linear_(residual, x, w4_expand(weight, x.dtype), bias)
