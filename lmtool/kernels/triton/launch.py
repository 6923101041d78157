"""What every launcher asks of the card: its architecture and whether kernels may start before the last one ends.

Knows no op. Nothing here runs at import.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.driver import driver

HOPPER = 90


def arch(device: torch.device) -> int:
    """Compute capability as one number (90 for 9.0); 0 where kernels are interpreted on a CPU.

    The meta device, on which `precompile` rehearses, is the card that is compiled for.
    """
    if device.type == "meta":
        return int(driver.active.get_current_target().arch)
    return _capability(device) if device.type == "cuda" else 0


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def multiprocessors(device: torch.device) -> int:
    """How many the card has; those of an H200 where there is none, which matters to no kernel's code."""
    return _multiprocessors(device) if device.type == "cuda" else 132


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Launch arguments of programmatic dependent launch: on from Hopper, off elsewhere and in the interpreter."""
    return {"PDL": True, "launch_pdl": True} if arch(device) >= HOPPER else {"PDL": False}


@cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeros [65536] int32 with which the programs of one kernel count each other; every kernel leaves zeros behind.

    One for a device: kernels that count run one after the other, on one stream.
    """
    return torch.zeros(65536, dtype=torch.int32, device=device)


@triton.jit
def allow_next(PDL: tl.constexpr):
    """The next kernel may begin once every program of this one has come here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Returns when the kernels before this one have finished and their writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(ptrs):
    """Ask for the 128-byte lines at ptrs to be brought into the second-level cache: always safe, it reads nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )
