"""The paged K/V cache: bytes per block, how many blocks fit, the tensors. Knows nobody who owns a block."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtool.config import EngineConfig
from lmtool.errors import MemoryShortError
from lmtool.kernels import KV_BLOCK, KV_SCHEMES, KvScheme, empty_kv, kv_block_bytes
from lmtool.layers.kv_store import DenseKv, Int4Store, KvStore, QuantizedStore
from lmtool.models.config import ModelConfig

_log = logging.getLogger(__name__)
BLOCK_SIZE = KV_BLOCK
_GIB = 1 << 30
_CPU_DEFAULT_BYTES = 2 * _GIB
_CPU_DEFAULT_SHARE = 0.5  # of the memory that is free
KvParameters = Sequence[tuple[Tensor, Tensor]]  # of each layer: k_meta and v_meta of a 'static' cache


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """``num_blocks`` includes block 0, which belongs to nobody. ``session_len`` is what the cache can hold of it.

    scheme            None: K and V as numbers of the model's dtype
    num_open_blocks   of 'int4': one for each slot and nobody's; they are ``open_block_bytes`` each, beside the blocks
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    session_len: int
    scheme: KvScheme | None = None
    num_open_blocks: int = 0
    open_block_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes + self.num_open_blocks * self.open_block_bytes

    @property
    def keeps_tails(self) -> bool:
        """Whether a partly filled block outlives its sequence's slot."""
        return self.num_open_blocks == 0


def block_bytes(model: ModelConfig, dtype: torch.dtype, scheme: KvScheme | None = None) -> int:
    """Of one block in all layers."""
    if scheme is not None:
        return model.num_layers * kv_block_bytes(scheme, model.num_kv_heads, model.head_dim)
    return 2 * model.num_layers * model.num_kv_heads * BLOCK_SIZE * model.head_dim * dtype.itemsize


def plan_cache(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int,
) -> CachePlan:
    """How many blocks fit into ``free_bytes`` (measured after the weights are loaded).

    Raises MemoryShortError where not one session of the asked length fits.
    """
    scheme = _scheme(config)
    if config.kv_choice != "auto":
        return _plan(config, model, dtype, device, free_bytes, scheme)
    try:
        plan = _plan(config, model, dtype, device, free_bytes, None)
        if plan.session_len == (config.session_len or model.max_positions):
            return plan
    except MemoryShortError:
        pass
    _log.warning("the K/V cache is int8: as numbers it does not hold a session of full length")
    return _plan(config, model, dtype, device, free_bytes, "int8")


def outline_plan(
    config: EngineConfig,
    session_len: int,
    *,
    num_blocks: int = 2,
    num_slots: int | None = None,
    is_static: bool = False,
) -> CachePlan:
    """A few blocks of what ``config`` asks for, whatever is free: for who drives a decoder without an engine."""
    scheme = _scheme(config)
    return CachePlan(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        block_bytes=0,
        session_len=session_len,
        scheme=scheme,
        num_open_blocks=(num_slots or config.max_batch_size) + 1 if scheme == "int4" else 0,
    )


def _scheme(config: EngineConfig) -> KvScheme | None:
    choice = config.kv_choice
    return next((scheme for scheme in KV_SCHEMES if scheme == choice), None)


def _plan(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int,
    scheme: KvScheme | None,
) -> CachePlan:
    one_block = block_bytes(model, dtype, scheme)
    num_open, one_open = (config.max_batch_size + 1, block_bytes(model, dtype, "int8")) if scheme == "int4" else (0, 0)
    session_len = config.session_len or model.max_positions
    session_blocks = -(-session_len // BLOCK_SIZE) + 1
    wanted = session_blocks * one_block + num_open * one_open
    budget = _budget(config, device, free_bytes, wanted)
    most_useful = session_blocks * config.max_batch_size
    num_blocks = min((budget - num_open * one_open) // one_block, most_useful)
    if num_blocks < (session_blocks if config.session_len else 2):
        fix = "lower --session-len or raise " + ("--cache-gb" if device.type == "cpu" else "--cache-max-entry-count")
        if scheme is None:
            fix += ", or give --kv-dtype int8, which takes half the bytes"
        raise MemoryShortError(
            f"the K/V cache of one session of {session_len} tokens needs {wanted >> 20} MiB, "
            f"{budget >> 20} MiB are given to it ({free_bytes >> 20} MiB free)",
            fix + (", or lower --max-batch-size" if num_open else ""),
        )
    return CachePlan(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        block_bytes=one_block,
        session_len=min(session_len, (num_blocks - 1) * BLOCK_SIZE),
        scheme=scheme,
        num_open_blocks=num_open,
        open_block_bytes=one_open,
    )


def _budget(config: EngineConfig, device: torch.device, free_bytes: int, wanted: int) -> int:
    """Bytes for the whole cache; wanted: what one session of the asked length needs."""
    if config.cache_gb is not None:
        budget = int(config.cache_gb * _GIB)
        if budget > free_bytes:
            raise MemoryShortError(
                f"--cache-gb {config.cache_gb:g} asks for more than the {free_bytes / _GIB:.1f} GiB that are free",
                "give less",
            )
        return budget
    if device.type == "cpu":
        return min(int(free_bytes * _CPU_DEFAULT_SHARE), max(_CPU_DEFAULT_BYTES, wanted))
    return int(free_bytes * config.cache_max_entry_count)


def allocate_cache(
    plan: CachePlan,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parameters: KvParameters | None = None,
) -> list[KvStore]:
    """Each layer's cache. Not cleared: no kernel reads a token that was not written.

    parameters: of a 'static' cache; on the meta device it has none.
    """
    return [
        _allocate(plan, model, dtype, device, parameters[i] if parameters else None) for i in range(model.num_layers)
    ]


def _allocate(
    plan: CachePlan,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parameters: tuple[Tensor, Tensor] | None,
) -> KvStore:
    heads, dim = model.num_kv_heads, model.head_dim
    if plan.scheme is None:
        shape = (heads, plan.num_blocks, plan.block_size, dim)
        return DenseKv(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
    if plan.scheme == "static" and parameters is None:
        nothing = torch.empty(heads, 1, 2, dim, dtype=torch.float16, device=device)
        parameters = (nothing, nothing)
    cache = empty_kv(plan.scheme, heads, plan.num_blocks, dim, device, parameters)
    if plan.scheme != "int4":
        return QuantizedStore(cache)
    return Int4Store(cache, empty_kv("int8", heads, plan.num_open_blocks, dim, device))
