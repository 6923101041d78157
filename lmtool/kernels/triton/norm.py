"""RMSNorm (arXiv 1910.07467) in Triton, several short rows or one long row a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous

_MAX_WIDTH = 32768
_ELEMENTS_PER_PROGRAM = 2048


@triton.jit
def normalize(x, mean_square, weight, eps, dtype: tl.constexpr):
    """x · rsqrt(mean_square + eps), rounded to dtype as checkpoints' own code rounds it, then times weight."""
    return (x.to(tl.float32) * tl.rsqrt(mean_square + eps)).to(dtype) * weight.to(dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    eps,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_h = tl.arange(0, BLOCK_H)
    mask = (o_t < num_rows)[:, None] & (o_h < H)[None, :]
    weight = tl.load(weight_ptr + o_h, mask=o_h < H, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + o_t[:, None] * H + o_h[None, :], mask=mask, other=0.0)
    x32 = x.to(tl.float32)
    mean_square = tl.sum(x32 * x32, axis=1) / H
    out = normalize(x, mean_square[:, None], weight[None, :], eps, x_ptr.dtype.element_ty)
    tl.store(out_ptr + o_t[:, None] * H + o_h[None, :], out, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    if width > _MAX_WIDTH or weight.shape != (width,):
        raise KernelError(f"rms_norm takes rows of at most {_MAX_WIDTH} and one weight each, got {list(x.shape)}")
    x = x.contiguous()
    out = torch.empty_like(x)
    num_rows = x.numel() // width
    if num_rows == 0:
        return out
    block_h = triton.next_power_of_2(width)
    block_t = max(1, _ELEMENTS_PER_PROGRAM // block_h)
    _rms_norm_kernel[(triton.cdiv(num_rows, block_t),)](
        x,
        weight,
        out,
        num_rows,
        eps,
        H=width,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=4 if block_h <= 4096 else 8,
        **dependent_launch(x.device),
    )
    return out
