"""Arithmetic on tensors: the only door. One typed function per op; `dispatch` chooses Triton or plain torch.

Knows neither layers nor engine nor the environment. Shapes: T tokens of a step, B sequences, Hq query heads,
Hkv key/value heads, D head dim, N out features, K in features, V vocabulary, NB cache blocks of `block_size` tokens.

The K/V cache of a layer is two tensors [Hkv, NB, block_size, D]; token t of a sequence lives in block
``block_table[t // block_size]`` at offset ``t % block_size``; its *slot* is ``block * block_size + offset``.
Block 0 belongs to no sequence: padded rows read and write it.
"""

import torch
from torch import Tensor

from lmtool.kernels.block_pieces import BlockPieces, block_pieces
from lmtool.kernels.dispatch import compile_ahead, force, implementation, is_capturable
from lmtool.kernels.kv_layout import KV_BLOCK, KV_SCHEMES, KvScheme, QuantizedKv, empty_kv, kv_block_bytes
from lmtool.kernels.layout import VECTOR_BYTES, DecodePlan, Peers, StepRows
from lmtool.kernels.w4_layout import W4_LARGEST_GROUP, W4Tiles, empty_w4, pack_w4, unpack_w4

__all__ = [
    "BlockPieces",
    "DecodePlan",
    "KV_BLOCK",
    "KV_SCHEMES",
    "KvScheme",
    "Peers",
    "QuantizedKv",
    "StepRows",
    "VECTOR_BYTES",
    "W4_LARGEST_GROUP",
    "W4Tiles",
    "add_all_reduce_",
    "add_linear_",
    "add_w4_linear_",
    "advance_",
    "attention_decode",
    "attention_prefill",
    "block_pieces",
    "compile_ahead",
    "empty_kv",
    "empty_w4",
    "force",
    "gather_blocks",
    "implementation",
    "is_capturable",
    "kv_attention_decode",
    "kv_attention_prefill",
    "kv_block_bytes",
    "kv_copy",
    "kv_store",
    "linear",
    "mask_",
    "norm_linear",
    "norm_linear_silu",
    "norm_w4_linear",
    "norm_w4_linear_silu",
    "pack_w4",
    "penalize_",
    "plan_decode",
    "rms_norm",
    "rope_store",
    "sample",
    "scatter_blocks",
    "silu_mul",
    "step_rows",
    "unpack_w4",
    "w4_expand",
    "w4_linear",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] · weight [H] → x / sqrt(mean(x²) + eps) · weight, in x's dtype; the mean is taken in fp32."""
    return implementation("norm", x.device, x.dtype).rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2·I] (gate first) → silu(gate) · up [T, I]."""
    return implementation("activation", gate_up.device, gate_up.dtype).silu_mul(gate_up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] · weight [N, K] (+ bias [N]) → x @ weight.T + bias [T, N]."""
    return implementation("linear", x.device, x.dtype).linear(x, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(rms_norm(x), weight, bias): x [T, K], norm_weight [K], weight [N, K] → [T, N]."""
    return implementation("linear", x.device, x.dtype).norm_linear(x, norm_weight, eps, weight, bias)


def norm_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """silu_mul(linear(rms_norm(x), weight)): x [T, K], weight [2·I, K] (gate rows first) → [T, I]."""
    return implementation("linear", x.device, x.dtype).norm_linear_silu(x, norm_weight, eps, weight)


def add_linear_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual [T, N] += x [T, K] @ weight [N, K].T (+ bias); the same tensor is returned."""
    return implementation("linear", x.device, x.dtype).add_linear_(residual, x, weight, bias)


def add_all_reduce_(hidden: Tensor, part: Tensor, peers: Peers) -> Tensor:
    """hidden += Σ over ranks of their part, taken in float32 and rounded once; the same tensor is returned.

    Both contiguous, of one shape and dtype, whole vectors of VECTOR_BYTES. All ranks call this with as many values, in
    the same order.
    """
    return implementation("all_reduce", hidden.device, hidden.dtype).add_all_reduce_(hidden, part, peers)


def w4_expand(weight: W4Tiles, dtype: torch.dtype) -> Tensor:
    """4-bit weights → the dense matrix [N, K]; paired rows come out as gates, then ups."""
    return implementation("w4", weight.tiles.device, dtype).w4_expand(weight, dtype)


def w4_linear(x: Tensor, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    """`linear` with 4-bit weights: x [T, K] float16 or bfloat16 (float32 is expanded first) → [T, N]."""
    return implementation("w4", x.device, x.dtype).w4_linear(x, weight, bias)


def norm_w4_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    """w4_linear(rms_norm(x), weight, bias): x [T, K], norm_weight [K] → [T, N]."""
    return implementation("w4", x.device, x.dtype).norm_w4_linear(x, norm_weight, eps, weight, bias)


def norm_w4_linear_silu(x: Tensor, norm_weight: Tensor, eps: float, weight: W4Tiles) -> Tensor:
    """silu_mul(w4_linear(rms_norm(x), weight)): weight is paired [2·I, K] → [T, I]."""
    return implementation("w4", x.device, x.dtype).norm_w4_linear_silu(x, norm_weight, eps, weight)


def add_w4_linear_(residual: Tensor, x: Tensor, weight: W4Tiles, bias: Tensor | None = None) -> Tensor:
    """residual [T, N] += w4_linear(x, weight, bias); the same tensor is returned."""
    return implementation("w4", x.device, x.dtype).add_w4_linear_(residual, x, weight, bias)


def rope_store(
    qkv: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate q and k (half-split pairs), write k and v into the cache, return q.

    qkv      [T, (Hq + 2·Hkv) · D], q heads first, then k, then v
    cos_sin  [T, R] float32: cos of R/2 angles, then sin; R ≤ D, dims beyond R are not rotated
    slots    [T] int64: where each token goes
    k_cache, v_cache [Hkv, NB, block_size, D], written in place
    q_norm, k_norm   [D]: RMSNorm over each head before the rotation (Qwen3), with ``eps``
    → q [T, Hq, D]
    """
    impl = implementation("rotary", qkv.device, qkv.dtype, k_cache.shape[3])
    return impl.rope_store(qkv, cos_sin, slots, k_cache, v_cache, q_norm, k_norm, eps)


def plan_decode(seq_lens: Tensor, num_kv_heads: int, window: int = 0) -> DecodePlan:
    """seq_lens [B] int32 → the step's work list for `attention_decode`: made once, used by every layer of a window."""
    return implementation("attention", seq_lens.device).plan_decode(seq_lens, num_kv_heads, window)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    plan: DecodePlan | None = None,
) -> Tensor:
    """One query per sequence over its paged K/V, which already holds the query's own token.

    q [B, Hq, D]; block_tables [B, max_blocks] int32; seq_lens [B] int32 (0: a padded row, its output is zero);
    window > 0: only the last ``window`` tokens are seen; plan: plan_decode(seq_lens, Hkv, window), made here if
    it is not given. → [B, Hq, D]
    """
    impl = implementation("attention", q.device, q.dtype, q.shape[2])
    return impl.attention_decode(q, k_cache, v_cache, block_tables, seq_lens, scale, window, plan)


def attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Causal attention of S chunks over their paged K/V (cached prefix and the chunk itself).

    q [T, Hq, D], chunk s is rows cu_seqlens_q[s]:cu_seqlens_q[s+1] and the *last* tokens of its sequence;
    block_tables [S, max_blocks] int32; cu_seqlens_q [S + 1] int32; seq_lens [S] int32: prefix + chunk;
    max_seqlen_q: the longest chunk (a host number). → [T, Hq, D]
    """
    impl = implementation("attention", q.device, q.dtype, q.shape[2])
    return impl.attention_prefill(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, scale, window
    )


def kv_store(
    qkv: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: QuantizedKv,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`rope_store` into a quantized cache of any scheme but 'int4', whose blocks become so when they are full."""
    impl = implementation("kv", qkv.device, qkv.dtype, cache.head_dim)
    return impl.kv_store(qkv, cos_sin, slots, cache, q_norm, k_norm, eps)


def kv_copy(source: QuantizedKv, source_blocks: Tensor, target: QuantizedKv, target_blocks: Tensor) -> None:
    """Blocks of an 'int8' cache into another, as they are or, where that one is 'int4', as four bits.

    source_blocks, target_blocks [n] int32; nothing is written for a target of 0. What is written to 'int4' is all 64
    tokens of a block. Targets differ from one another.
    """
    implementation("kv", source.k.device, torch.float16, source.head_dim).kv_copy(
        source, source_blocks, target, target_blocks
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
    """`attention_decode` over a quantized cache.

    opened, open_blocks [B] int32: an 'int8' cache and, of each sequence, the block of it that is read in place of the
    sequence's last one, (seq_len - 1) // 64, full or not.
    """
    impl = implementation("kv", q.device, q.dtype, q.shape[2])
    return impl.kv_attention_decode(q, cache, block_tables, seq_lens, scale, window, plan, opened, open_blocks)


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
    """`attention_prefill` over a quantized cache.

    fresh, fresh_first [S] int32: an 'int8' cache that holds every block in which a chunk has tokens; of sequence s
    block j is its block fresh_first[s] + j. A query sees the tokens of its own block there and all before in
    ``cache``, however the prompt was cut into chunks.
    """
    impl = implementation("kv", q.device, q.dtype, q.shape[2])
    return impl.kv_attention_prefill(
        q, cache, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, scale, window, fresh, fresh_first
    )


def penalize_(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Penalties in place. logits [B, V] float32, contiguous; prompt_mask [B, V] bool; output_counts [B, V] int32.

    The others are [B] float32. repetition (CTRL, arXiv 1909.05858) divides positive and multiplies negative logits
    of every token seen in prompt or answer; presence and frequency (OpenAI) subtract once and per occurrence, over
    the answer. Raises KernelError on a GPU for other logits: rounding and copying would both lose penalties.
    """
    impl = implementation("sampling", logits.device, logits.dtype)
    return impl.penalize_(logits, prompt_mask, output_counts, repetition, presence, frequency)


def mask_(logits: Tensor, rows: Tensor, words: Tensor) -> Tensor:
    """What is not allowed becomes -inf, in place. logits [B, V] float32, contiguous; rows [n] int32, each once.

    words [n, ceil(V / 32)] int32: bit i % 32 of word i // 32 says whether the row may give token i; all beyond V is
    ignored. Raises KernelError on a GPU for other logits.
    """
    return implementation("sampling", logits.device, logits.dtype).mask_(logits, rows, words)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
) -> Tensor:
    """One token per row by Gumbel-max over what top-k, then top-p, then min-p leave.

    logits [B, V] float32, or float16 or bfloat16 as they are: the arithmetic is float32's; temperature [B] float32
    (0: argmax); top_k [B] int32 (0: off); top_p [B] float32 (1: off); min_p [B] float32 (0: off); seeds
    [B] int64; steps [B] int64 (the token's index in its answer). → ids [B] int64.
    The noise of a row is a hash of (seed, step, token id): it does not depend on the other rows. Tokens tied with
    the last one kept are kept.
    """
    impl = implementation("sampling", logits.device, logits.dtype)
    return impl.sample(logits, temperature, top_k, top_p, min_p, seeds, steps)


def step_rows(rows: Tensor, longs: Tensor, words: Tensor, tables: Tensor, block_size: int) -> StepRows:
    """The rows of a decode step out of the state of all slots.

    rows [B] int32: each row's slot, -1: none; longs [4, S] int64 and words [4, S] int32: `layout` names their rows;
    tables [S, max_blocks] int32: block tables.
    """
    return implementation("step", rows.device).step_rows(rows, longs, words, tables, block_size)


def advance_(rows: Tensor, ids: Tensor, logits: Tensor, longs: Tensor, num_ids: int) -> None:
    """The rows' slots got a token: it is the next one to compute, one place further.

    ids [B] int64, out of ``num_ids``; logits [B, V] in any float dtype: what they were chosen from, or a rank's part of
    it; rows and longs as above. A row whose logits are not numbers (its first one tells: what is wrong with a hidden
    state is wrong with all of them) gets id -1 in ``ids``; its slot goes on with token 0, so that whatever comes after
    is at least in the vocabulary.
    """
    implementation("step", rows.device).advance_(rows, ids, logits, longs, num_ids)


def gather_blocks(pieces: BlockPieces, blocks: Tensor, rows: Tensor) -> None:
    """Whole blocks [n] int64 of a cache → rows [n, row_words] int64, a block in one piece each."""
    implementation("blocks", rows.device).gather_blocks(pieces, blocks, rows)


def scatter_blocks(pieces: BlockPieces, blocks: Tensor, rows: Tensor) -> None:
    """The inverse of `gather_blocks`: rows [n, row_words] → the blocks [n] of the cache."""
    implementation("blocks", rows.device).scatter_blocks(pieces, blocks, rows)
