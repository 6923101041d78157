"""One row of `lmtool bench kv`, measured in a process of its own: `python -m lmtool.bench.kv_row` reads what to run as
JSON from stdin and writes what it saw to stdout. So that memory is one configuration's alone. Knows no table.
"""

import json
import resource
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmtool.bench.offline import drive, greedy_requests
from lmtool.bench.shapes import find_shape
from lmtool.config import EngineConfig
from lmtool.engine.device import choose_device
from lmtool.engine.setup import LoadedEngine, load_engine, load_random
from lmtool.errors import LmtoolError
from lmtool.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """model or shape; peer: transformers instead of the engine; prompts: token ids, each answered by itself."""

    name: str
    model: str | None
    shape: str | None
    group_size: int | None
    peer: bool
    engine: dict[str, Any]
    prompts: list[list[int]]
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of one row: medians over its prompts, and bytes. cache_bytes, per_token_bytes: of transformers not known."""

    name: str
    weights: str
    decode_tokens_per_s: float
    time_to_first_token_s: float
    peak_bytes: int
    cache_bytes: int | None = None
    per_token_bytes: float | None = None


def measure(row: Row) -> Seen:
    """Raises what loading does."""
    device = choose_device(row.engine["device"])
    run = _run_peer if row.peer else _run_engine
    weights, firsts, rates, cache = run(row, device)
    return Seen(
        name=row.name,
        weights=weights,
        decode_tokens_per_s=statistics.median(rates),
        time_to_first_token_s=statistics.median(firsts),
        peak_bytes=_peak_bytes(device),
        **cache,
    )


def _peak_bytes(device: torch.device) -> int:
    """Of the card's memory, or of this process's with Python and torch in it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run_engine(row: Row, device: torch.device) -> tuple[str, list[float], list[float], dict[str, Any]]:
    loaded = _load(row)
    firsts, rates = [], []
    for prompt in [row.prompts[0], *row.prompts]:  # the first is run once more, to warm up
        seen = drive(loaded.core, greedy_requests([tuple(prompt)], [row.output_len])).metrics()
        firsts.append(seen["time_to_first_token_s"])
        rates.append(seen["decode_tokens_per_s"])
    plan = loaded.plan
    cache = {"cache_bytes": plan.num_bytes, "per_token_bytes": plan.block_bytes / plan.block_size}
    return loaded.weights, firsts[1:], rates[1:], cache


def _load(row: Row) -> LoadedEngine:
    config = EngineConfig(**row.engine)
    if row.shape is not None:
        return load_random(find_shape(row.shape), config, None, row.group_size)
    return load_engine(Path(str(row.model)), config)


def _run_peer(row: Row, device: torch.device) -> tuple[str, list[float], list[float], dict[str, Any]]:
    from lmtool.bench.transformers_peer import TransformersPeer
    from lmtool.engine.device import choose_dtype

    source: Path | ModelConfig = find_shape(row.shape) if row.shape is not None else Path(str(row.model))
    shape = source if isinstance(source, ModelConfig) else _config_of(source)
    dtype = choose_dtype(row.engine["dtype"], shape, device)
    peer = TransformersPeer(source, dtype, device)
    firsts, rates = [], []
    for prompt in [row.prompts[0], *row.prompts]:
        first, steps = peer.step_times([tuple(prompt)], row.output_len)
        firsts.append(first)
        rates.append(len(steps) / sum(steps))
    return peer.name, firsts[1:], rates[1:], {}


def _config_of(path: Path) -> ModelConfig:
    from lmtool.checkpoint.formats import open_checkpoint
    from lmtool.models.loader import read_model_config

    checkpoint = open_checkpoint(path)
    try:
        return read_model_config(checkpoint.config)
    finally:
        checkpoint.close()


if __name__ == "__main__":
    try:
        print(json.dumps({"seen": asdict(measure(Row(**json.load(sys.stdin))))}))  # noqa: T201
    except LmtoolError as error:
        print(json.dumps({"cause": error.cause, "fix": error.fix}))  # noqa: T201
