"""SwiGLU's gate (arXiv 2002.05202) in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous

_BLOCK = 1024


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) · up with the roundings of torch: silu in float32, each result rounded to dtype."""
    gate32 = gate.to(dtype).to(tl.float32)
    silu = gate32 / (1.0 + tl.exp(-gate32))
    return silu.to(dtype) * up.to(dtype)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, I: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # noqa: E741
    allow_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_i < I
    gate = tl.load(gate_up_ptr + row * 2 * I + o_i, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * I + I + o_i, mask=mask, other=0.0)
    tl.store(out_ptr + row * I + o_i, gated(gate, up, out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise KernelError(f"silu_mul takes [T, 2·I], got {list(gate_up.shape)}")
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, _BLOCK))
        _silu_mul_kernel[grid](gate_up, out, I=width, BLOCK=_BLOCK, num_warps=4, **dependent_launch(gate_up.device))
    return out
