"""RMSNorm (arXiv 1910.07467), plain torch."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as _torch_rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.numel() == weight.numel() and x.dtype == torch.float32 and x.device.type == "cpu":
        # decoding one row: torch's own op costs 24 us on 2 cores, this 8, and there are two a layer
        row = x.view(-1)
        inverse = (float(torch.dot(row, row)) / weight.numel() + eps) ** -0.5
        return (x * weight).mul_(inverse)
    if x.dtype == weight.dtype and x.dtype.itemsize == 4:
        return _torch_rms_norm(x, weight.shape, weight, eps)
    # half precision: normalise in float32, round once, then scale, as every checkpoint's own code does
    normed = _torch_rms_norm(x.float(), weight.shape, None, eps)
    return normed.to(x.dtype) * weight
