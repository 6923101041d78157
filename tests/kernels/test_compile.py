"""Every kernel compiles for every supported card on a machine without one; on Hopper without spilling registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_choose_kernel",
    "_decode_kernel",
    "_penalize_kernel",
    "_plan_kernel",
    "_prefill_kernel",
    "_rms_norm_kernel",
    "_rope_store_kernel",
    "_row_kernel",
    "_scan_kernel",
    "_silu_mul_kernel",
    "_tile_kernel",
}


def compiled(capability: int) -> list[dict[str, int | str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.offline", str(capability)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


# shared memory that one program may have, in KB (CUDA C++ programming guide, compute capabilities)
SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}


@pytest.mark.parametrize("capability", [75, 80, 86, 89])
def test_every_kernel_compiles_and_fits(capability):
    found = compiled(capability)
    assert {kernel["kernel"] for kernel in found} == KERNELS
    assert [kernel for kernel in found if kernel["shared"] > SHARED_KB[capability] * 1024] == []


def test_hopper_spills_nothing():
    found = compiled(90)
    assert {kernel["kernel"] for kernel in found} == KERNELS
    assert [kernel for kernel in found if kernel["stack"] or kernel["shared"] > SHARED_KB[90] * 1024] == []
