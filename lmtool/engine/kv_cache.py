"""The paged K/V cache: bytes per block, how many blocks fit, the tensors. Knows nobody who owns a block."""

from dataclasses import dataclass

import torch

from lmtool.config import EngineConfig
from lmtool.errors import MemoryShortError
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import KvCache

BLOCK_SIZE = 64
_GIB = 1 << 30
_CPU_DEFAULT_BYTES = 2 * _GIB
_CPU_DEFAULT_SHARE = 0.5  # of the memory that is free


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """``num_blocks`` includes block 0, which belongs to nobody. ``session_len`` is what the cache can hold of it."""

    num_blocks: int
    block_size: int
    block_bytes: int
    session_len: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def block_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * model.num_layers * model.num_kv_heads * BLOCK_SIZE * model.head_dim * dtype.itemsize


def plan_cache(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, free_bytes: int
) -> CachePlan:
    """How many blocks fit into ``free_bytes`` (measured after the weights are loaded).

    Raises MemoryShortError where not one session of the asked length fits.
    """
    one_block = block_bytes(model, dtype)
    session_len = config.session_len or model.max_positions
    session_blocks = -(-session_len // BLOCK_SIZE) + 1
    if config.cache_gb is not None:
        budget = int(config.cache_gb * _GIB)
        if budget > free_bytes:
            raise MemoryShortError(
                f"--cache-gb {config.cache_gb:g} asks for more than the {free_bytes / _GIB:.1f} GiB that are free",
                "give less",
            )
    elif device.type == "cpu":
        budget = min(int(free_bytes * _CPU_DEFAULT_SHARE), max(_CPU_DEFAULT_BYTES, session_blocks * one_block))
    else:
        budget = int(free_bytes * config.cache_max_entry_count)
    most_useful = session_blocks * config.max_batch_size
    num_blocks = min(budget // one_block, most_useful)
    if num_blocks < (session_blocks if config.session_len else 2):
        raise MemoryShortError(
            f"the K/V cache of one session of {session_len} tokens needs {session_blocks * one_block >> 20} MiB, "
            f"{budget >> 20} MiB are given to it ({free_bytes >> 20} MiB free)",
            "lower --session-len or raise " + ("--cache-gb" if device.type == "cpu" else "--cache-max-entry-count"),
        )
    return CachePlan(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        block_bytes=one_block,
        session_len=min(session_len, (num_blocks - 1) * BLOCK_SIZE),
    )


def allocate_cache(plan: CachePlan, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[KvCache]:
    """K and V of each layer, [Hkv, NB, block_size, D]. Not cleared: no kernel reads a token that was not written."""
    shape = (model.num_kv_heads, plan.num_blocks, plan.block_size, model.head_dim)

    def empty() -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return [(empty(), empty()) for _ in range(model.num_layers)]
