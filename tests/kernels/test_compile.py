"""Every kernel compiles for every supported card on a machine without one, within the card's shared memory."""

import pytest

from tests.kernels.support import HOPPER, compiled

KERNELS = {
    "_choose_kernel",
    "_decode_kernel",
    "_expand_kernel",
    "_gather_kernel",
    "_narrow_kernel",
    "_mask_kernel",
    "_penalize_kernel",
    "_plan_kernel",
    "_prefill_kernel",
    "_rms_norm_kernel",
    "_rope_store_kernel",
    "_row_kernel",
    "_scan_kernel",
    "_silu_mul_kernel",
    "_tile_kernel",
    "few_rows_kernel",
    "kv_copy_kernel",
    "kv_decode_kernel",
    "kv_store_kernel",
    "sort_x_kernel",
    "wide_hopper_kernel",
    "wide_kernel",
}
HOPPER_ONLY = {"wide_hopper_kernel"}
# they are for an instruction that came with 8.0
NOT_ON_TURING = {"few_rows_kernel", "kv_decode_kernel", "sort_x_kernel"}
# shared memory that one program may have, in KB (CUDA C++ programming guide, compute capabilities)
SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}


@pytest.mark.parametrize("capability", SHARED_KB)
def test_every_kernel_compiles_and_fits(capability):
    found = compiled(capability)
    wanted = KERNELS - NOT_ON_TURING if capability < 80 else KERNELS
    if capability != HOPPER:
        wanted = wanted - HOPPER_ONLY
    assert {kernel["kernel"] for kernel in found} == wanted
    assert [kernel for kernel in found if kernel["shared"] > SHARED_KB[capability] * 1024] == []
