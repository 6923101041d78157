"""`--calib-dataset self`: text that the model samples itself, so that a command needs neither a network nor a file.

Half of the sequences begin with the beginning-of-sequence token, where the tokenizer has one, the others with a token
that the seed draws: a chat model says in the first kind what it answers with, in the second what else it has read.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lmtool.config import EngineConfig, GenerationConfig
from lmtool.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lmtool.engine.sequence import Request
    from lmtool.engine.setup import LoadedEngine
    from lmtool.quant.options import CalibrationOptions
    from lmtool.tokenizer import Tokenizer

# sequences; as many as their cache has room for, for one that is put off is computed twice
_MOST_AT_ONCE = {"cpu": 64, "cuda": 256}
# fewer different tokens than this share of a sequence: it went round in circles
_LEAST_DISTINCT = 1 / 8
_ATTEMPTS = 4  # for each sequence


def sampler(model: Path, device: str) -> Callable[["CalibrationOptions"], "Tensor"]:
    """What `quant.job.Job.sample` wants: the model's own text, int64 [samples, seqlen]."""
    return partial(_sample, model, device)


def _sample(model: Path, device: str, options: "CalibrationOptions") -> "Tensor":
    """Temperature 1 from the whole vocabulary; ends of sequences are read over, as a packed text has them.

    Raises ConfigError where the model says the same few words over and over.
    """
    import torch

    from lmtool.commands.lite_report import context_of
    from lmtool.engine.device import choose_device
    from lmtool.engine.setup import load_engine
    from lmtool.tokenizer import load_tokenizer

    torch.set_num_threads(torch.get_num_threads())  # or MKL takes fewer when the machine is busy: other last bits
    context = context_of(model)
    if options.seqlen > context:
        raise ConfigError(f"--calib-seqlen is {options.seqlen}, the model's context is {context}", "give a smaller one")
    config = EngineConfig(
        device=device,
        session_len=options.seqlen,
        max_batch_size=min(options.samples, _MOST_AT_ONCE[choose_device(device).type]),
        prefix_caching=False,
        cuda_graphs=False,
    )
    tokenizer, loaded = load_tokenizer(model), load_engine(model, config)
    bar = Progress(
        TextColumn("the model writes its calibration text"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )
    task = bar.add_task("", total=options.samples * options.seqlen)
    kept: list[list[int]] = []
    try:
        with bar:
            for attempt in range(_ATTEMPTS):
                first = attempt * options.samples
                wanted = options.samples - len(kept)
                requests = [_request(i, options, tokenizer) for i in range(first, first + wanted)]
                found = _run(loaded, requests, lambda: bar.advance(task))
                kept += [ids for ids in found if len(set(ids)) >= _LEAST_DISTINCT * len(ids)]
                if len(kept) == options.samples:
                    return torch.tensor(kept)
                bar.update(task, completed=len(kept) * options.seqlen)
    finally:
        loaded.core.close()
    raise ConfigError(
        f"{model} repeats itself in {options.samples - len(kept)} of {options.samples} samples of its own text",
        "give --calib-dataset FILE",
    )


def _request(index: int, options: "CalibrationOptions", tokenizer: "Tokenizer") -> "Request":
    from lmtool.engine.sequence import Request

    seed = options.seed * 1_000_003 + index
    return Request(
        request_id=index,
        prompt_ids=(_first_token(index, seed, tokenizer),),
        params=GenerationConfig(temperature=1.0, ignore_eos=True, max_new_tokens=options.seqlen - 1),
        stop_ids=frozenset(),
        seed=seed % 2**63,
    )


def _first_token(index: int, seed: int, tokenizer: "Tokenizer") -> int:
    from random import Random

    if index % 2 == 0 and tokenizer.bos_id is not None:
        return tokenizer.bos_id
    draw = Random(seed)  # noqa: S311  not for secrets
    while tokenizer.is_special(token := draw.randrange(tokenizer.vocab_size)):
        pass
    return token


def _run(loaded: "LoadedEngine", requests: list["Request"], told: Callable[[], None]) -> list[list[int]]:
    """The ids of each request, its first token among them."""
    plan = loaded.plan
    at_once = max(1, (plan.num_blocks - 1) // -(-plan.session_len // plan.block_size))
    ids = {request.request_id: list(request.prompt_ids) for request in requests}
    for first in range(0, len(requests), at_once):
        for request in requests[first : first + at_once]:
            loaded.core.add(request)
        while loaded.core.has_work:
            for output in loaded.core.step():
                if output.error is not None:
                    raise output.error
                if output.token_id is not None:
                    ids[output.request_id].append(output.token_id)
                    told()
    return list(ids.values())
