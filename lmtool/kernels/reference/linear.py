"""Matrix products and what is fused around them on a GPU, plain torch."""

from torch import Tensor
from torch.nn.functional import linear as _torch_linear

from lmtool.kernels.reference.activation import silu_mul
from lmtool.kernels.reference.norm import rms_norm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _torch_linear(x, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _torch_linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    return silu_mul(_torch_linear(rms_norm(x, norm_weight, eps), weight))


def add_linear_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return residual.add_(_torch_linear(x, weight, bias))
