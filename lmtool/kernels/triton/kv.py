"""A quantized K/V cache (`kv_layout`) in Triton: kernels are in `kv_write`, `kv_decode`, `attention`, `prefill`."""

import torch
import triton
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.kv_layout import QuantizedKv
from lmtool.kernels.layout import DecodePlan
from lmtool.kernels.triton import kv_decode
from lmtool.kernels.triton.attention import launch_decode
from lmtool.kernels.triton.kv_write import kv_copy_kernel, kv_store_kernel
from lmtool.kernels.triton.launch import dependent_launch
from lmtool.kernels.triton.paged import quantized
from lmtool.kernels.triton.prefill import launch_prefill
from lmtool.kernels.triton.rotary import query_heads

# programs for K and as many for V: four of each for every multiprocessor of the largest card
_COPIES_AT_ONCE = 528


def kv_store(
    qkv: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: QuantizedKv,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    num_kv_heads, head_dim = cache.num_heads, cache.head_dim
    num_tokens, width = qkv.shape
    num_q_heads = query_heads("kv_store", width, num_kv_heads, head_dim)
    if cache.scheme == "int4":
        raise KernelError("kv_store: a block becomes 'int4' when it is full; its tokens go into an 'int8' cache")
    q = torch.empty((num_tokens, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    has_norm = q_norm is not None and k_norm is not None
    block_h = 8
    num_parts = triton.cdiv(num_q_heads, block_h) + 2 * triton.cdiv(num_kv_heads, block_h)
    kv_store_kernel[(num_tokens, num_parts)](
        qkv.contiguous(),
        cos_sin.contiguous(),
        slots,
        *cache[:4],
        q_norm if has_norm else qkv,
        k_norm if has_norm else qkv,
        q,
        eps,
        cache.num_blocks,
        HQ=num_q_heads,
        HKV=num_kv_heads,
        D=head_dim,
        DP=cache.padded_dim,
        R=cos_sin.shape[1],
        NORM=has_norm,
        STATIC=cache.scheme == "static",
        V_BITS=cache.v_bits,
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(cache.padded_dim),
        num_warps=4,
        **dependent_launch(qkv.device),
    )
    return q


def kv_copy(source: QuantizedKv, source_blocks: Tensor, target: QuantizedKv, target_blocks: Tensor) -> None:
    if source.scheme != "int8" or target.scheme not in ("int8", "int4"):
        raise KernelError(f"kv_copy: blocks go from 'int8' to 'int8' or 'int4', not {source.scheme} to {target.scheme}")
    theirs, ours = ((cache.num_heads, cache.head_dim) for cache in (source, target))
    if theirs != ours:
        raise KernelError(f"kv_copy: blocks of (heads, head dim) {theirs} do not fit into a cache of {ours}")
    num_copies = target_blocks.shape[0]
    if num_copies == 0:
        return
    dim = source.padded_dim
    # in a decode step few blocks are wanted: a program looks at several rather than many at one each
    at_once = min(num_copies, triton.cdiv(_COPIES_AT_ONCE, source.num_heads))
    kv_copy_kernel[(at_once, source.num_heads, 2)](
        *source[:4],
        source_blocks,
        *target[:4],
        target_blocks,
        source.num_blocks,
        target.num_blocks,
        num_copies,
        D=source.head_dim,
        DP=dim,
        SEAL=target.scheme == "int4",
        BLOCK_I=triton.next_power_of_2(dim) // 2,
        num_warps=4,
        **dependent_launch(target_blocks.device),
    )


def kv_attention_decode(
    q: Tensor,
    cache: QuantizedKv,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    plan: DecodePlan | None = None,
    opened: QuantizedKv | None = None,
    open_blocks: Tensor | None = None,
) -> Tensor:
    paged = quantized(cache, opened, open_blocks)
    if kv_decode.serves(q, cache):
        return kv_decode.kv_attention_decode(q, cache, block_tables, seq_lens, scale, window, plan, opened, open_blocks)
    return launch_decode(q, paged, block_tables, seq_lens, scale, window, plan)


def kv_attention_prefill(
    q: Tensor,
    cache: QuantizedKv,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
    fresh: QuantizedKv | None = None,
    fresh_first: Tensor | None = None,
) -> Tensor:
    paged = quantized(cache, fresh, fresh_first)
    return launch_prefill(q, paged, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, scale, window)
