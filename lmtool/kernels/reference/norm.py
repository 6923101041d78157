"""RMSNorm (arXiv 1910.07467), plain torch."""

from torch import Tensor
from torch.nn.functional import rms_norm as _torch_rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype and x.dtype.itemsize == 4:
        return _torch_rms_norm(x, weight.shape, weight, eps)
    # half precision: normalise in float32, round once, then scale, as every checkpoint's own code does
    normed = _torch_rms_norm(x.float(), weight.shape, None, eps)
    return normed.to(x.dtype) * weight
