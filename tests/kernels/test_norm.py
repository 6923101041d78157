"""RMSNorm and the SwiGLU gate: Triton against the reference."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels.reference import activation as reference_activation
from lmtool.kernels.reference import norm as reference
from lmtool.kernels.triton import activation as triton_activation
from lmtool.kernels.triton import norm as triton_norm
from tests.kernels.support import DTYPES, assert_close, normal

LARGE = [pytest.param((700, 4096), marks=pytest.mark.gpu), pytest.param((3, 14336), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 100), (37, 3, 80), (2, 2100), *LARGE])
def test_rms_norm(shape, dtype, device):
    x, weight = normal(*shape, dtype=dtype, device=device, scale=3), normal(shape[-1], dtype=dtype, device=device)
    assert_close(triton_norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 130), (2, 2200), *LARGE])
def test_silu_mul(shape, dtype, device):
    gate_up = normal(*shape, dtype=dtype, device=device, scale=4)
    assert_close(triton_activation.silu_mul(gate_up), reference_activation.silu_mul(gate_up))


def test_a_weight_of_another_width_is_refused(device):
    with pytest.raises(KernelError, match="rms_norm takes rows"):
        triton_norm.rms_norm(torch.ones(2, 8, device=device), torch.ones(7, device=device), 1e-6)


def test_no_rows(device):
    assert triton_norm.rms_norm(torch.ones(0, 8, device=device), torch.ones(8, device=device), 1e-6).shape == (0, 8)
    assert triton_activation.silu_mul(torch.ones(0, 8, device=device)).shape == (0, 4)
