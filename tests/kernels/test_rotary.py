"""Rotation, per-head norm and the K/V write: Triton against the reference."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels.reference import rotary as reference
from lmtool.kernels.triton import rotary as triton_rotary
from tests.kernels.support import DTYPES, assert_close, normal

# (tokens, q heads, kv heads, head dim, rotated dims): grouped heads, a head dim that is no power of two, part rotated
SHAPES = [
    (1, 4, 2, 64, 64),
    (3, 9, 3, 80, 80),
    (5, 4, 4, 32, 16),
    pytest.param(300, 32, 8, 128, 128, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hq", "hkv", "d", "r"), SHAPES)
def test_rope_store(tokens, hq, hkv, d, r, dtype, has_norm, device):
    num_blocks, block_size = 2 + tokens // 16, 16
    qkv = normal(tokens, (hq + 2 * hkv) * d, dtype=dtype, device=device)
    angles = torch.rand(tokens, r // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    slots = torch.randperm(num_blocks * block_size)[:tokens].to(device)
    norms = [normal(d, dtype=dtype, device=device) for _ in range(2)] if has_norm else [None, None]
    caches = [normal(hkv, num_blocks, block_size, d, dtype=dtype, device=device) for _ in range(2)]
    expected_caches = [cache.clone() for cache in caches]
    q = triton_rotary.rope_store(qkv, cos_sin, slots, *caches, *norms, 1e-5)
    expected_q = reference.rope_store(qkv, cos_sin, slots, *expected_caches, *norms, 1e-5)
    assert_close(q, expected_q)
    assert_close(caches[0], expected_caches[0])
    assert torch.equal(caches[1], expected_caches[1])


def test_heads_that_do_not_fit_are_refused(device):
    cache = torch.zeros(2, 2, 16, 32, device=device)
    with pytest.raises(KernelError, match="heads of 32"):
        triton_rotary.rope_store(
            torch.ones(1, 100, device=device), torch.ones(1, 32, device=device), torch.zeros(1), cache, cache
        )
