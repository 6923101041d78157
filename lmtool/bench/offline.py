"""Workloads on the engine's core: token ids in and out, greedy, end-of-sequence ignored, no text and no HTTP inside.

Knows no other engine; `compare` sets one beside it.
"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lmtool.bench.limits import Limits
from lmtool.bench.roofline import Cost, Work, ideal_run, model_cost
from lmtool.bench.runs import Run
from lmtool.bench.workloads import Prompt, Workload
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.core import EngineCore
from lmtool.engine.graphs import StartProgress
from lmtool.engine.sequence import Request
from lmtool.engine.setup import LoadedEngine, load_engine, load_random
from lmtool.errors import ConfigError, EngineError
from lmtool.models.config import ModelConfig
from lmtool.models.loader import read_model_config

_GIB = 1 << 30
_OF_ONE_KIND_OF_STEP = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True, slots=True)
class Metric:
    """median and best of the repeats; limit: of the ideal machine. ratio: how much of the limit was reached."""

    median: float
    best: float
    limit: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A workload's figures. durations_s: of each repeat; num_bytes and flops: what the ideal machine moves and does."""

    name: str
    num_requests: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_steps: int
    num_preemptions: int
    durations_s: list[float]
    metrics: dict[str, Metric]
    num_bytes: float | None = None
    flops: float | None = None


# ---------------------------------------------------------------------- an engine to measure
def load(
    source: Path | ModelConfig,
    config: EngineConfig,
    workloads: Sequence[Workload],
    progress: StartProgress | None = None,
    group_size: int | None = None,
) -> LoadedEngine:
    """A checkpoint, or a shape with random weights; its context just holds the workloads' longest request.

    group_size: the shape's weights are 4-bit, in groups of so many. Raises ConfigError where a checkpoint's context
    is shorter than that.
    """
    longest = max(workloads, key=lambda workload: workload.longest)
    config = replace(config, session_len=longest.longest, prefix_caching=wants_prefix_cache(workloads))
    if isinstance(source, ModelConfig):
        return load_random(source, config, progress, group_size)
    _check_context(source, longest)
    return load_engine(source, config, progress)


def _check_context(path: Path, longest: Workload) -> None:
    checkpoint = open_checkpoint(path)
    try:
        model = read_model_config(checkpoint.config)
    finally:
        checkpoint.close()
    if longest.longest > model.max_positions:
        raise ConfigError(
            f"{longest.name} has a request of {longest.longest} tokens, the model's context is {model.max_positions}",
            "give a smaller --input-len, --output-len or --prefill-len, or another --mix",
        )


def wants_prefix_cache(workloads: Sequence[Workload]) -> bool:
    """Raises ConfigError for a mixture: a figure is measured either with the prefix cache or without it."""
    sharing = [workload.name for workload in workloads if workload.shares_prefix]
    if sharing and len(sharing) < len(workloads):
        raise ConfigError(
            f"--mix {sharing[0]} is measured with the prefix cache and the others without", "run it by itself"
        )
    return bool(sharing)


def engine_cost(loaded: LoadedEngine, num_ranks: int = 1) -> Cost | None:
    """Of all ranks together. The cache's bytes per token are the plan's own, which is one rank's; None where the
    weights' storage is not known here.
    """
    plan, model = loaded.plan, loaded.model
    elements = 2 * model.num_layers * max(1, model.num_kv_heads // num_ranks) * model.head_dim
    weights = loaded.weights.removesuffix(f", in {num_ranks} parts")
    return model_cost(model, weights, plan.block_bytes / plan.block_size / elements)


# ---------------------------------------------------------------------- one run
def greedy_requests(prompts: Sequence[Prompt], num_new_tokens: Sequence[int]) -> list[Request]:
    """Requests that give exactly this many tokens each."""
    return [
        Request(
            request_id=i,
            prompt_ids=prompt,
            params=GenerationConfig(temperature=0.0, ignore_eos=True, max_new_tokens=count),
            stop_ids=frozenset(),
            seed=i,
        )
        for i, (prompt, count) in enumerate(zip(prompts, num_new_tokens, strict=True))
    ]


def drive(core: EngineCore, submitted: Sequence[Request]) -> Run:
    """Submit all at once and step until idle.

    Raises what ended a request, and EngineError where one did not get as many tokens as it was to get.
    """
    missing = {request.request_id: request.params.max_new_tokens or 0 for request in submitted}
    run = Run(sum(len(request.prompt_ids) for request in submitted))
    started = time.perf_counter()
    for request in submitted:
        core.add(request)
    while core.has_work:
        outputs = core.step()
        run.record(time.perf_counter() - started, [o.request_id for o in outputs if o.token_id is not None])
        for output in outputs:
            if output.error is not None:
                raise output.error
            missing[output.request_id] -= output.token_id is not None
    wrong = {i: count for i, count in missing.items() if count}
    if wrong:
        raise EngineError(f"{len(wrong)} of {len(missing)} requests got another number of tokens than was asked for")
    return run


# ---------------------------------------------------------------------- a workload
def measure(
    loaded: LoadedEngine,
    workload: Workload,
    *,
    max_batch_size: int,
    num_ranks: int = 1,
    limits: Limits | None = None,
    repeats: int = 3,
    warm_up: int = 1,
    seed: int = 0,
) -> Result:
    """Run the workload ``warm_up`` + ``repeats`` times, each with prompts of its own; figures beside their limits.

    max_batch_size, num_ranks: what the engine was loaded with; the ideal machine has the same, and the same token
    budget. limits: of one device.
    """
    core, vocab_size = loaded.core, loaded.model.vocab_size
    num_new_tokens = [size.num_new_tokens for size in workload.sizes]

    def once(prompt_seed: int) -> Run:
        return drive(core, greedy_requests(workload.prompts(vocab_size, prompt_seed), num_new_tokens))

    for i in range(warm_up):
        once(seed + repeats + i)
    preempted_before = core.scheduler.counters.num_preemptions
    runs = [once(seed + i) for i in range(repeats)]
    ideal, work = _ideal(loaded, workload, max_batch_size, num_ranks, limits)
    by_duration = sorted(runs, key=lambda run: run.duration_s)
    return Result(
        name=workload.name,
        num_requests=len(workload.sizes),
        num_prompt_tokens=workload.num_prompt_tokens,
        num_generated_tokens=runs[0].num_generated_tokens,
        num_steps=len(by_duration[len(runs) // 2].steps),
        num_preemptions=core.scheduler.counters.num_preemptions - preempted_before,
        durations_s=[run.duration_s for run in runs],
        metrics=_metrics(runs, _limits(ideal, workload)),
        num_bytes=work.num_bytes if work else None,
        flops=work.flops if work else None,
    )


def _ideal(
    loaded: LoadedEngine, workload: Workload, max_batch_size: int, num_ranks: int, limits: Limits | None
) -> tuple[Run | None, Work | None]:
    """Ranks on GPUs have one each; those of a CPU share it."""
    cost = engine_cost(loaded, num_ranks)
    if limits is None or cost is None:
        return None, None
    num_devices = num_ranks if loaded.device.type == "cuda" else 1
    return ideal_run(
        workload,
        cost,
        limits.read_bytes_per_s * num_devices,
        limits.matmul_flops_per_s * num_devices,
        max_batch_size=max_batch_size,
        max_batched_tokens=loaded.core.scheduler.max_batched_tokens,
    )


def _limits(ideal: Run | None, workload: Workload) -> dict[str, float]:
    """What to compare with. Where requests differ, which steps have prompts in them is the scheduler's doing, and the
    ideal machine's does otherwise: rates of one kind of step are not comparable then.
    """
    limits = ideal.metrics() if ideal else {}
    if len(set(workload.sizes)) > 1:
        limits = {name: limit for name, limit in limits.items() if name not in _OF_ONE_KIND_OF_STEP}
    return limits


def _metrics(runs: Sequence[Run], limits: dict[str, float]) -> dict[str, Metric]:
    found = [run.metrics() for run in runs]
    metrics = {}
    for name in found[0]:
        values = [one[name] for one in found]
        median, limit = statistics.median(values), limits.get(name)
        shorter_is_better = name.endswith("_s") and not name.endswith("_per_s")
        best = min(values) if shorter_is_better else max(values)
        ratio = None if limit is None else (limit / median if shorter_is_better else median / limit)
        metrics[name] = Metric(median, best, limit, ratio)
    return metrics


def free(loaded: LoadedEngine) -> None:
    """Let go of weights and cache."""
    loaded.core.close()
    gc.collect()  # captured steps and what they use hold each other
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
