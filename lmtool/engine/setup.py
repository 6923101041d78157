"""Model name + `EngineConfig` → an engine that is ready: device and dtype chosen, weights loaded, cache planned.

Everything that can be refused is refused here, before the first request.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmtool.checkpoint.formats import Checkpoint, open_checkpoint
from lmtool.config import EngineConfig
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.executor import LocalExecutor
from lmtool.engine.graphs import StartProgress
from lmtool.engine.kv_cache import CachePlan, plan_cache
from lmtool.engine.model_runner import ModelRunner
from lmtool.engine.scheduler import Scheduler
from lmtool.errors import CheckpointError, ConfigError, DeviceError, MemoryShortError
from lmtool.kernels.cpu import multiplies_bfloat16
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder
from lmtool.models.loader import Progress, load_decoder, read_model_config

_log = logging.getLogger(__name__)
_GIB = 1 << 30
_OLDEST_CARD = (7, 5)
_DEFAULT_BATCHED_TOKENS = {"cuda": 8192, "cpu": 512}
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


def load_engine(
    path: Path,
    config: EngineConfig,
    progress: Progress | None = None,
    start_progress: StartProgress | None = None,
) -> LoadedEngine:
    """progress: of the weights; start_progress: of what a GPU needs after them.

    Raises CheckpointError, DeviceError, ConfigError or MemoryShortError, each with what would help.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    checkpoint = open_checkpoint(path)
    try:
        _check_format(checkpoint, config)
        model = read_model_config(checkpoint.config)
        keep_int4 = _keeps_int4(checkpoint, config, device)
        dtype = torch.float32 if keep_int4 else choose_dtype(config.dtype, model, device)
        decoder = _load(checkpoint, model, config, dtype, device, keep_int4, progress)
        defaults = checkpoint.generation_config
    finally:
        checkpoint.close()
    _log.info("weights loaded in %.1f s", time.perf_counter() - started)
    core, plan = build_core(decoder, config, start_progress)
    stored = "int4" if keep_int4 else str(dtype).removeprefix("torch.")
    return LoadedEngine(core, model, plan, device, stored, defaults, time.perf_counter() - started)


def build_core(
    decoder: Decoder, config: EngineConfig, progress: StartProgress | None = None
) -> tuple[EngineCore, CachePlan]:
    """The engine around a decoder that is in memory. Raises MemoryShortError."""
    plan = plan_cache(config, decoder.config, decoder.dtype, decoder.device, free_bytes(decoder.device))
    budget = config.max_batched_tokens or _DEFAULT_BATCHED_TOKENS[decoder.device.type]
    on_gpu = decoder.device.type == "cuda"
    runner = (
        _device_runner(decoder, plan, config, budget, progress)
        if on_gpu
        else ModelRunner(decoder, plan, max_batch_size=config.max_batch_size)
    )
    blocks = BlockManager(plan.num_blocks, plan.block_size, prefix_caching=config.prefix_caching)
    scheduler = Scheduler(
        blocks,
        max_batch_size=config.max_batch_size,
        max_batched_tokens=budget,
        join_group=max(1, config.max_batch_size // _JOIN_SHARE) if on_gpu else 1,
    )
    return EngineCore(scheduler, LocalExecutor(runner), session_len=plan.session_len), plan


def _device_runner(
    decoder: Decoder, plan: CachePlan, config: EngineConfig, max_batched_tokens: int, progress: StartProgress | None
) -> DeviceRunner:
    started = time.perf_counter()
    try:
        runner = DeviceRunner(decoder, plan, max_batch_size=config.max_batch_size)
        runner.warm_up(max_batched_tokens=max_batched_tokens, cuda_graphs=config.cuda_graphs, progress=progress)
    except torch.cuda.OutOfMemoryError:
        raise MemoryShortError(
            f"no memory for a step on {decoder.device} beside a K/V cache of {plan.num_bytes / _GIB:.1f} GiB",
            "lower --cache-max-entry-count, --max-batch-size or --max-batched-tokens",
        ) from None
    _log.info("kernels compiled and decode steps captured in %.1f s", time.perf_counter() - started)
    return runner


# ---------------------------------------------------------------------- what to run on
def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is {name!r}", "give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"--device {name} is not supported", "give cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU or driver"
        )
        raise DeviceError(f"--device {name}: {why}", "use --device cpu, or see `lmtool check_env`")
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} GPUs", "count from cuda:0")
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CARD:
        raise DeviceError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}",
            "7.5 (Turing) or newer is needed; use --device cpu",
        )
    return torch.device("cuda", index)


def choose_dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """'auto': the checkpoint's half precision on a GPU; on a CPU bfloat16 where it multiplies it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise DeviceError("--dtype bfloat16 needs compute capability 8.0 or newer", "use --dtype float16")
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    bfloat16 = model.dtype == "bfloat16" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if bfloat16 else torch.float16


def _keeps_int4(checkpoint: Checkpoint, config: EngineConfig, device: torch.device) -> bool:
    """A GGUF's 4-bit weights are used as they are on a CPU, unless a dtype was asked for."""
    if config.dtype != "auto" or device.type != "cpu" or checkpoint.format != "gguf":
        return False
    return any(checkpoint.dtype(name) in ("q4_0", "q4_1") for name in checkpoint.names())


def _check_format(checkpoint: Checkpoint, config: EngineConfig) -> None:
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else "?"
        raise CheckpointError(
            f"{checkpoint.path} is quantized ({method})", "this version runs unquantized checkpoints and GGUF files"
        )
    if config.model_format is not None and config.model_format != checkpoint.format:
        raise ConfigError(
            f"--model-format is {config.model_format!r}, {checkpoint.path} is {checkpoint.format!r}",
            "leave the flag out: the format is detected",
        )


# ---------------------------------------------------------------------- memory
def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on ``device`` can have now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise DeviceError("/proc/meminfo does not say how much memory is free", "give --cache-gb")


def _load(
    checkpoint: Checkpoint,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    keep_int4: bool,
    progress: Progress | None,
) -> Decoder:
    needed = model.num_parameters * (1 if keep_int4 else dtype.itemsize)
    free = free_bytes(device)
    if needed > free:
        smaller = "float16" if dtype == torch.float32 else None
        raise MemoryShortError(
            f"the weights need {needed / _GIB:.1f} GiB on {device}, {free / _GIB:.1f} GiB are free",
            f"use --dtype {smaller} or a smaller model" if smaller else "use a smaller or a 4-bit model",
        )
    session_len = config.session_len or model.max_positions
    if config.session_len and config.session_len > model.max_positions and model.rope.kind == "default":
        raise ConfigError(
            f"--session-len {config.session_len} is longer than the model's {model.max_positions} tokens",
            f"give at most {model.max_positions}",
        )
    try:
        return load_decoder(
            checkpoint,
            model,
            dtype=dtype,
            device=device,
            num_positions=session_len,
            keep_int4=keep_int4,
            progress=progress,
        )
    except torch.cuda.OutOfMemoryError:
        raise MemoryShortError(
            f"the weights ({needed / _GIB:.1f} GiB) did not fit on {device} ({free / _GIB:.1f} GiB were free)",
            "close what else uses the card, or use a smaller model",
        ) from None
