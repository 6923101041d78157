"""Model name + `EngineConfig` → an engine that is ready: device and dtype chosen, weights loaded, cache planned.

Everything that can be refused is refused here, before the first request.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtool import kernels
from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.device import choose_device, free_bytes, memory_short
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.executor import LocalExecutor
from lmtool.engine.graphs import StartProgress
from lmtool.engine.host_memory import HostPlan, check_host_tier, plan_host_tier, staging_bytes
from lmtool.engine.host_tier import HostTier
from lmtool.engine.kv_cache import CachePlan, outline_plan, plan_cache
from lmtool.engine.load_weights import bring_kv_parameters, bring_vision, how_stored, load_weights, stored_as
from lmtool.engine.model_runner import ModelRunner
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.swap_cost import SwapCost
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder
from lmtool.models.loader import outline_decoder

if TYPE_CHECKING:
    from lmtool.kernels.triton.precompile import Precompilation

_log = logging.getLogger(__name__)
_GIB = 1 << 30
_DEFAULT_BATCHED_TOKENS = {"cuda": 8192, "cpu": 512}
_DEFAULT_IMAGE_TILES = {"cuda": 16, "cpu": 4}
_JOIN_SHARE = 32  # of the slots must be free before those who wait for one start: see Scheduler


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    core: EngineCore
    model: ModelConfig
    plan: CachePlan
    device: torch.device
    weights: str  # how they are stored: 'float16', 'int4', …
    generation_defaults: Mapping[str, Any]
    load_s: float
    takes_images: bool = False

    def described(self, name: str) -> str:
        """One line: model, device, how its weights are stored, context, load time."""
        return (
            f"{name} · {self.weights} on {self.device} · "
            f"context {self.plan.session_len} tokens · loaded in {self.load_s:.1f} s"
        )


def load_engine(
    path: Path,
    config: EngineConfig,
    progress: StartProgress | None = None,
) -> LoadedEngine:
    """A model out of its files, ready for requests; on a GPU kernels are compiled while the weights are read.

    Raises CheckpointError, DeviceError, ConfigError or MemoryShortError, each with what would help.
    """
    started = time.perf_counter()
    config = under_engine_file(config, path)
    device = choose_device(config.device)
    check_host_tier(config)
    checkpoint = open_checkpoint(path)
    try:
        model, keep_int4, dtype = how_stored(checkpoint, config, device)
        compiling = None
        if device.type == "cuda":
            compiling = compile_steps(outline_decoder(checkpoint, model, dtype, keep_int4=keep_int4), config, device)
        with closing(compiling) if compiling else nullcontext():
            decoder = load_weights(checkpoint, model, config, dtype, device, keep_int4, progress)
            bring_kv_parameters(decoder, config, path)
            bring_vision(decoder, checkpoint)
            defaults = checkpoint.generation_config
            _log.info("weights loaded after %.1f s", time.perf_counter() - started)
            core, plan = build_core(decoder, config, progress, compiling)
    finally:
        checkpoint.close()
    return LoadedEngine(
        core,
        model,
        plan,
        device,
        stored_as(decoder, keep_int4),
        defaults,
        time.perf_counter() - started,
        decoder.vision is not None,
    )


def build_core(
    decoder: Decoder,
    config: EngineConfig,
    progress: StartProgress | None = None,
    compiling: "Precompilation | None" = None,
) -> tuple[EngineCore, CachePlan]:
    """The engine around a decoder that is in memory. compiling: its kernels. Raises MemoryShortError."""
    device = decoder.device
    free = free_bytes(device)
    staging = staging_bytes(config, device, free)
    plan = plan_cache(config, decoder.config, decoder.dtype, device, free - staging)
    host = plan_host_tier(config, plan.block_bytes, device, staging)
    budget = batched_tokens(config, device)
    on_gpu = device.type == "cuda"
    runner = (
        _device_runner(decoder, plan, host, config, progress, compiling)
        if on_gpu
        else ModelRunner(decoder, plan, max_batch_size=config.max_batch_size, host=host)
    )
    blocks = BlockManager(
        plan.num_blocks,
        plan.block_size,
        prefix_caching=config.prefix_caching,
        keep_tails=plan.keeps_tails,
        host=HostTier(host.num_blocks, host.block_bytes) if host else None,
    )
    scheduler = Scheduler(
        blocks,
        max_batch_size=config.max_batch_size,
        max_batched_tokens=budget,
        max_image_tiles=config.max_image_tiles or _DEFAULT_IMAGE_TILES[device.type],
        join_group=max(1, config.max_batch_size // _JOIN_SHARE) if on_gpu else 1,
        swap_cost=SwapCost(runner.load_bytes_per_s, plan.block_bytes),
    )
    return EngineCore(scheduler, LocalExecutor(runner), session_len=plan.session_len), plan


def batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """The token budget of one step."""
    return config.max_batched_tokens or _DEFAULT_BATCHED_TOKENS[device.type]


def compile_steps(outline: Decoder, config: EngineConfig, device: torch.device) -> "Precompilation | None":
    """Begin to compile what a decoder like ``outline`` (on the meta device, two layers will do) needs on ``device``.

    The cache's size is not known yet; no kernel is compiled for it.
    """
    session_len = config.session_len or outline.config.max_positions
    plan = outline_plan(config, session_len)
    budget = batched_tokens(config, device)

    def rehearse() -> None:
        DeviceRunner(outline, plan, max_batch_size=config.max_batch_size).rehearse(budget)

    return kernels.compile_ahead(rehearse, device, outline.dtype, outline.config.head_dim)


def compile_model(path: Path, config: EngineConfig, progress: StartProgress | None = None) -> None:
    """Compile what a model needs for the card at hand into the user's cache, so that a start compiles nothing.

    Raises as `load_engine` does.
    """
    config = under_engine_file(config, path)
    device = choose_device("cuda" if config.device == "auto" else config.device)
    with closing(open_checkpoint(path)) as checkpoint:
        model, keep_int4, dtype = how_stored(checkpoint, config, device)
        compiling = compile_steps(outline_decoder(checkpoint, model, dtype, keep_int4=keep_int4), config, device)
    if compiling is not None:
        with closing(compiling):
            compiling.wait(partial(progress, "compiling kernels") if progress else None)


def _device_runner(
    decoder: Decoder,
    plan: CachePlan,
    host: HostPlan | None,
    config: EngineConfig,
    progress: StartProgress | None,
    compiling: "Precompilation | None",
) -> DeviceRunner:
    started = time.perf_counter()
    cache_flag = "--cache-max-entry-count" if config.cache_gb is None else "--cache-gb"
    with memory_short(
        f"no memory for a step on {decoder.device} beside a K/V cache of {plan.num_bytes / _GIB:.1f} GiB",
        f"lower {cache_flag} or --max-batch-size, in Python also max_batched_tokens",
    ):
        runner = DeviceRunner(decoder, plan, max_batch_size=config.max_batch_size, host=host, progress=progress)
        if compiling is not None:
            compiling.wait(partial(progress, "compiling kernels") if progress else None)
            _log.info("kernels compiled after another %.1f s", time.perf_counter() - started)
        budget = batched_tokens(config, decoder.device)
        runner.warm_up(max_batched_tokens=budget, cuda_graphs=config.cuda_graphs, progress=progress)
    _log.info("decode steps captured after another %.1f s", time.perf_counter() - started)
    return runner
