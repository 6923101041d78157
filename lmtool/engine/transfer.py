"""Between host and device without anybody waiting: pinned memory, copies in the order of the stream."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16  # bytes: what kernels like to find an array at


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """All arrays in one copy → tensors of the same shapes and dtypes on ``device``."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    # torch keeps pinned memory from being reused before the copies that were started from it are over
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = packed.numpy()
    for start, array in zip(starts, arrays, strict=True):
        view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def download(tensor: Tensor) -> Tensor:
    """A copy on the host, which is there once an event recorded after this call has passed."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}[array.dtype.name]
