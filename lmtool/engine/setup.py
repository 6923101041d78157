"""Model name + `EngineConfig` → an engine that is ready: device and dtype chosen, weights loaded, cache planned.

Everything that can be refused is refused here, before the first request.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.device import choose_device, free_bytes, memory_short
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.executor import LocalExecutor, RankExecutor, Runner
from lmtool.engine.graphs import StartProgress
from lmtool.engine.host_memory import HostPlan, check_host_tier, plan_host_tier, staging_bytes
from lmtool.engine.host_tier import HostTier
from lmtool.engine.kv_cache import CachePlan, plan_cache
from lmtool.engine.model_runner import ModelRunner
from lmtool.engine.parts import Part, batched_tokens, random_part, stored_part
from lmtool.engine.ranks import Ranks
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.swap_cost import SwapCost
from lmtool.errors import InputError
from lmtool.layers.group import Group
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder
from lmtool.models.loader import read_model_config
from lmtool.models.shard import Shard

if TYPE_CHECKING:
    from lmtool.kernels.triton.precompile import Precompilation

_log = logging.getLogger(__name__)
_GIB = 1 << 30
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
    with (
        ranks_of(config, device, path=path) as ranks,
        stored_part(path, config, device, ranks.group if ranks else None, progress) as part,
    ):
        _log.info("weights loaded after %.1f s", time.perf_counter() - started)
        core, plan = build_core(part.decoder, config, progress, part.compiling, ranks)
    return _loaded(part, core, plan, device, started)


def load_random(
    model: ModelConfig,
    config: EngineConfig,
    progress: StartProgress | None = None,
    group_size: int | None = None,
) -> LoadedEngine:
    """An engine of this shape with random weights; group_size: 4-bit ones, in groups of so many.

    Raises MemoryShortError, DeviceError or ConfigError.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    check_host_tier(config)
    with (
        ranks_of(config, device, shape=model, group_size=group_size) as ranks,
        random_part(model, config, device, ranks.group if ranks else None, group_size) as part,
    ):
        core, plan = build_core(part.decoder, config, progress, part.compiling, ranks)
    return _loaded(part, core, plan, device, started)


def load_rank(
    config: EngineConfig,
    device: torch.device,
    group: Group,
    *,
    path: Path | None,
    shape: ModelConfig | None,
    group_size: int | None,
) -> Runner:
    """What a rank that is not the first runs: a model out of its files, or a shape. Raises as those two do."""
    if shape is not None:
        with random_part(shape, config, device, group, group_size) as part:
            return build_runner(part.decoder, config, None, part.compiling)[0]
    assert path is not None
    with stored_part(path, config, device, group, None) as part:
        return build_runner(part.decoder, config, None, part.compiling)[0]


@contextmanager
def ranks_of(
    config: EngineConfig,
    device: torch.device,
    *,
    path: Path | None = None,
    shape: ModelConfig | None = None,
    group_size: int | None = None,
) -> Iterator[Ranks | None]:
    """The other ranks, where there are to be some; they are ended where what is done with them fails."""
    if config.tp == 1:
        yield None
        return
    Shard(0, config.tp).check(shape if shape is not None else _model_of(path))  # before any other process is started
    ranks = Ranks(config, device, path=path, shape=shape, group_size=group_size)
    try:
        yield ranks
    except Exception as error:
        try:
            if not isinstance(error, InputError):
                ranks.watch.explain()  # why one of them is not there is why this failed
        finally:
            ranks.close()
        raise


def _model_of(path: Path | None) -> ModelConfig:
    assert path is not None
    with closing(open_checkpoint(path)) as checkpoint:
        return read_model_config(checkpoint.config)


def _loaded(part: Part, core: EngineCore, plan: CachePlan, device: torch.device, started: float) -> LoadedEngine:
    decoder = part.decoder
    size = decoder.group.size if decoder.group is not None else 1
    return LoadedEngine(
        core,
        part.model,
        plan,
        device,
        part.stored_as if size == 1 else f"{part.stored_as}, in {size} parts",
        part.generation_defaults,
        time.perf_counter() - started,
        decoder.vision is not None,
    )


def build_core(
    decoder: Decoder,
    config: EngineConfig,
    progress: StartProgress | None = None,
    compiling: "Precompilation | None" = None,
    ranks: Ranks | None = None,
) -> tuple[EngineCore, CachePlan]:
    """The engine around a decoder that is in memory. compiling: its kernels. Raises MemoryShortError."""
    device = decoder.device
    runner, plan, host = build_runner(decoder, config, progress, compiling)
    if ranks is not None:
        ranks.watch.wait_until_ready()
    on_gpu = device.type == "cuda"
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
        max_batched_tokens=batched_tokens(config, device),
        max_image_tiles=config.max_image_tiles or _DEFAULT_IMAGE_TILES[device.type],
        join_group=max(1, config.max_batch_size // _JOIN_SHARE) if on_gpu else 1,
        swap_cost=SwapCost(runner.load_bytes_per_s, plan.block_bytes),
    )
    executor = RankExecutor(runner, ranks) if ranks is not None else LocalExecutor(runner)
    return EngineCore(scheduler, executor, session_len=plan.session_len), plan


def build_runner(
    decoder: Decoder,
    config: EngineConfig,
    progress: StartProgress | None,
    compiling: "Precompilation | None",
) -> tuple[ModelRunner | DeviceRunner, CachePlan, HostPlan | None]:
    """One rank's. Raises MemoryShortError."""
    device = decoder.device
    free = free_bytes(device)
    if decoder.group is not None:  # all ranks have as many blocks
        free = decoder.group.least(free)
    staging = staging_bytes(config, device, free)
    plan = plan_cache(config, decoder.config, decoder.dtype, device, free - staging)
    host = plan_host_tier(config, plan.block_bytes, device, staging)
    if device.type == "cuda":
        return _device_runner(decoder, plan, host, config, progress, compiling), plan, host
    return ModelRunner(decoder, plan, max_batch_size=config.max_batch_size, host=host), plan, host


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
