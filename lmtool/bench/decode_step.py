"""`DecodeStep`: one step of a decoder with few layers, as a CUDA graph: where a kernel's neighbours are what they are.

A launch configuration that is fast among its like can slow down what runs before and after it; here that is seen.
"""

from dataclasses import replace

import torch

from lmtool import kernels
from lmtool.bench.timing import graphed
from lmtool.engine.kv_cache import BLOCK_SIZE, CachePlan, allocate_cache
from lmtool.layers.context import AttentionContext
from lmtool.models.config import ModelConfig
from lmtool.models.random import random_decoder

_CONTEXT = 256  # tokens of each sequence
_LEAST_BYTES = 1 << 30  # of weights in the layers: far beyond the caches


class DecodeStep:
    """``rows`` sequences of 256 tokens; random weights in the model's sizes, without biases; greedy."""

    def __init__(self, model: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        attention_size = model.num_heads * model.head_dim
        per_layer = model.hidden_size * (model.qkv_size + attention_size + 3 * model.intermediate_size)
        enough = max(4, -(-_LEAST_BYTES // (per_layer * dtype.itemsize)))
        model = replace(model, num_layers=min(model.num_layers, enough), qkv_bias=False)
        self._decoder = random_decoder(model, dtype=dtype, device=device, num_positions=_CONTEXT)
        blocks = _CONTEXT // BLOCK_SIZE
        plan = CachePlan(num_blocks=rows * blocks + 1, block_size=BLOCK_SIZE, block_bytes=0, session_len=_CONTEXT)
        self._caches = allocate_cache(plan, model, dtype, device)
        for cache in self._caches:
            for part in cache.tensors():
                part.normal_(0, 1)
        tables = (torch.randperm(rows * blocks, device=device) + 1).view(rows, blocks)
        self._ids = torch.randint(model.vocab_size, (rows,), device=device)
        self._context = AttentionContext(
            num_decode=rows,
            positions=torch.full((rows,), _CONTEXT - 1, device=device),
            slots=tables[:, -1] * BLOCK_SIZE + BLOCK_SIZE - 1,
            seq_lens=torch.full((rows,), _CONTEXT, dtype=torch.int32, device=device),
            block_tables=tables.int(),
        )
        zeros, ones = torch.zeros(rows, device=device), torch.ones(rows, device=device)
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        self._sampling = zeros, zeros.int(), ones, zeros, steps, steps

    def graph(self) -> torch.cuda.CUDAGraph:
        """With the launch configurations of this moment."""
        with torch.inference_mode():
            return graphed(self._step)

    def _step(self) -> None:
        model = self._decoder.config
        plan = kernels.plan_decode(self._context.seq_lens, model.num_kv_heads)
        hidden = self._decoder.forward(self._ids, replace(self._context, plan=plan), self._caches)
        self._ids.copy_(kernels.sample(self._decoder.scores(hidden), *self._sampling))
