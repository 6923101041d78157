"""Every kernel compiles for every supported card, and what it costs on Hopper, read from the code that the installed
Triton makes: no card is asked. One file, because each process that looks reads all of it again.

A budget is what was measured (docs/log.md) and a tenth: it is there to notice a change, not to be reached.
"""

import pytest

from tests.kernels.support import HOPPER, compiled

pytestmark = pytest.mark.timeout(900)  # where Triton's cache is cold, on a machine that has other things to do

KERNELS = {
    "_add_all_reduce_kernel",
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
# instructions of one thread, summed over threads, for each K or V element of the decode loop, by head dim. At 4.3 TB/s
# of fp16 a multiprocessor takes 8 elements and issues 128 such instructions a clock: 16 would be the limit.
# A head dim of 80 is computed as 128.
INSTRUCTIONS_AN_ELEMENT = {80: 4.4, 128: 3.3, 256: 2.7}


@pytest.mark.parametrize("capability", SHARED_KB)
def test_every_kernel_compiles_and_fits(capability):
    found = compiled(capability)
    wanted = KERNELS - NOT_ON_TURING if capability < 80 else KERNELS
    if capability != HOPPER:
        wanted = wanted - HOPPER_ONLY
    assert {kernel["kernel"] for kernel in found} == wanted
    assert [kernel for kernel in found if kernel["shared"] > SHARED_KB[capability] * 1024] == []


@pytest.mark.parametrize(
    "kernel",
    [
        "_add_all_reduce_kernel",
        "_decode_kernel",
        "_prefill_kernel",
        "_row_kernel",
        "_tile_kernel",
        "_scan_kernel",
        "few_rows_kernel",
        "kv_decode_kernel",
        "kv_copy_kernel",
        "kv_store_kernel",
        "wide_hopper_kernel",
    ],
)
def test_nothing_spills(kernel):
    found = [made for made in compiled(HOPPER) if made["kernel"] == kernel]
    assert found
    assert [made for made in found if made["stack"] or made["local"]] == []


def test_decode_attention_stays_within_its_instructions():
    decodes = [made for made in compiled(HOPPER) if made["kernel"] == "_decode_kernel"]
    found = [made for made in decodes if made["scheme"] == "dense"]
    assert {made["D"] for made in found} == set(INSTRUCTIONS_AN_ELEMENT)
    for made in found:
        assert made["loop"] > 100, f"the loop over keys was not found: {made}"
        per_element = made["loop"] * 32 * made["num_warps"] / (2 * made["BLOCK_T"] * made["D"])
        assert per_element <= INSTRUCTIONS_AN_ELEMENT[made["D"]], made


# of four that an H200 can issue for each 4-bit weight while it reads at full speed; issue 4 asks for 2.6 up to 16 rows
INSTRUCTIONS_A_WEIGHT = 2.6


def test_four_bit_weights_stay_within_their_instructions():
    found = [made for made in compiled(HOPPER) if made["kernel"] == "few_rows_kernel"]
    assert {(made["VALUES"], made["HELD"], made["NORM"]) for made in found} >= {
        (2, False, False),
        (2, False, True),
        (2, True, True),
        (8, False, False),
        (16, False, False),
    }
    for made in found:
        assert made["loop"] > 100, f"the loop over tiles was not found: {made}"
        assert made["conversions"] == 0, made  # from integer to float: they would be one a weight
        weights = 32 * 128  # of a tile, which is one warp's
        # a kernel without a loop is all of its instructions, what is around the product included
        if made["GROUPS"] == 1 and not made["HELD"]:
            assert made["loop"] * 32 / weights <= INSTRUCTIONS_A_WEIGHT, made


def test_four_bit_weights_are_expanded_while_the_tensor_cores_multiply():
    """Two waits for eight products and more of a turn: with as many waits as products nothing overlaps."""
    found = [made for made in compiled(HOPPER) if made["kernel"] == "wide_hopper_kernel"]
    assert {made["BM"] for made in found} == {64, 128, 256}
    for made in found:
        assert made["products"] == 8 * made["HIGH"], f"the loop over tiles was not found: {made}"
        assert made["waits"] == 2, made
        # at 256 rows two warps share a scheduler, and their products take 2048 clocks
        if made["GROUPS"] == 1:
            assert made["loop"] <= 410 * made["HIGH"], made


# of one thread, summed over threads, for each K or V element of a block: at 4.3 TB/s an H200 can issue eight for eight
# bits and four for four. Those of a block's softmax are shared by fewer elements where heads are narrow.
INSTRUCTIONS_A_CODE = {128: 1.85, 96: 2.3}


def test_quantized_decode_stays_within_its_instructions():
    found = [made for made in compiled(HOPPER) if made["kernel"] == "kv_decode_kernel"]
    assert {(made["scheme"], made["DIM"]) for made in found} >= {(scheme, 128) for scheme in ("int8", "int4", "static")}
    for made in found:
        assert made["loop"] > 100, f"the loop over blocks was not found: {made}"
        # from integer to float: they would be one a code; a few are of the mask
        assert made["conversions"] < 8, made
        assert made["loop"] * 32 / (2 * 64 * made["DIM"]) <= INSTRUCTIONS_A_CODE[made["DIM"]], made
