"""What kernel tests share: one tolerance per dtype, random tensors, and the shapes that are easy to get wrong."""

import pytest
import torch
from torch import Tensor

# relative and absolute; half precision leaves room for one rounding of the output and a different order of the sum
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}

# the interpreter multiplies bfloat16 wrongly (docs/log.md), so it is tried on a GPU only
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype=dtype, device=device)


def assert_close(actual: Tensor, expected: Tensor, *, loosen: float = 1.0) -> None:
    rtol, atol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol * loosen, atol=atol * loosen)
