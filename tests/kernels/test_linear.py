"""Matrix products: Triton against the reference, fused parts included."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels.reference import linear as reference
from lmtool.kernels.triton import linear as triton_linear
from tests.kernels.support import DTYPES, assert_close, normal

# (rows, out features, in features): one row and a few, widths that are no power of two, fewer columns than a tile
SHAPES = [(1, 33, 200), (1, 12, 2304), (2, 40, 64), (5, 70, 200), (19, 12, 40)]
LARGE = [(1, 28672, 4096), (1, 4096, 14336), (3, 6144, 4096), (16, 4096, 14336), (64, 4096, 4096), (300, 4096, 4096)]
SHAPES += [pytest.param(*shape, marks=pytest.mark.gpu) for shape in LARGE]
EPS = 1e-5


def loosen(k: int, *, roundings: int = 1) -> float:
    """Longer sums in another order, and results rounded more often on one side than the other."""
    return roundings * (1 + k / 4096)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
class TestAgainstReference:
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_linear(self, rows, n, k, dtype, device, has_bias):
        x, weight = normal(rows, k, dtype=dtype, device=device), normal(n, k, dtype=dtype, device=device, scale=k**-0.5)
        bias = normal(n, dtype=dtype, device=device) if has_bias else None
        assert_close(triton_linear.linear(x, weight, bias), reference.linear(x, weight, bias), loosen=loosen(k))

    @pytest.mark.parametrize("has_bias", [False, True])
    def test_norm_linear(self, rows, n, k, dtype, device, has_bias):
        x, weight = normal(rows, k, dtype=dtype, device=device, scale=3), normal(n, k, dtype=dtype, device=device)
        norm_weight = normal(k, dtype=dtype, device=device, scale=k**-0.5)
        bias = normal(n, dtype=dtype, device=device) if has_bias else None
        arguments = (x, norm_weight, EPS, weight, bias)
        assert_close(triton_linear.norm_linear(*arguments), reference.norm_linear(*arguments), loosen=loosen(k))

    def test_norm_linear_silu(self, rows, n, k, dtype, device):
        x, weight = normal(rows, k, dtype=dtype, device=device, scale=3), normal(2 * n, k, dtype=dtype, device=device)
        norm_weight = normal(k, dtype=dtype, device=device, scale=k**-0.5)
        arguments = (x, norm_weight, EPS, weight)
        # gate and up are both rounded before they meet
        expected = reference.norm_linear_silu(*arguments)
        assert_close(triton_linear.norm_linear_silu(*arguments), expected, loosen=loosen(k, roundings=2))

    @pytest.mark.parametrize("has_bias", [False, True])
    def test_add_linear_writes_in_place(self, rows, n, k, dtype, device, has_bias):
        x, weight = normal(rows, k, dtype=dtype, device=device), normal(n, k, dtype=dtype, device=device, scale=k**-0.5)
        bias = normal(n, dtype=dtype, device=device) if has_bias else None
        residual = normal(rows, n, dtype=dtype, device=device, scale=4)
        expected = reference.add_linear_(residual.clone(), x, weight, bias)
        returned = triton_linear.add_linear_(residual, x, weight, bias)
        assert returned.data_ptr() == residual.data_ptr()
        assert_close(residual, expected, loosen=loosen(k, roundings=2))


def test_no_rows(device):
    weight = torch.ones(3, 8, device=device)
    assert triton_linear.linear(torch.ones(0, 8, device=device), weight).shape == (0, 3)


def test_widths_that_do_not_match_are_named(device):
    with pytest.raises(KernelError, match=r"\[1, 7\] and \[3, 8\]"):
        triton_linear.linear(torch.ones(1, 7, device=device), torch.ones(3, 8, device=device))
