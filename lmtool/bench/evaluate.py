"""What a checkpoint lost: perplexity, and beside the original KL, the change of the loss and top-1 agreement.

Driven through the engine's decoder and a paged cache, in the chunks a prompt would be computed in. Every figure is a
mean over windows of one length with its standard error; two models see the same windows, so that differences are
paired. Knows no text: whoever calls gives token ids.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.config import EngineConfig
from lmtool.engine.device import memory_short
from lmtool.engine.kv_cache import BLOCK_SIZE, allocate_cache, outline_plan
from lmtool.engine.load_weights import open_decoder
from lmtool.engine.parts import batched_tokens
from lmtool.errors import CheckpointError, ConfigError, EngineError
from lmtool.layers.context import AttentionContext
from lmtool.models.decoder import Decoder

Progress = Callable[[str, int, int], None]  # what is being done, windows done, windows in all
_LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MiB in float32


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over windows and its standard error."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor) -> "Figure":
        """values float64 [N]: one of each window."""
        stderr = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(float(values.mean()), stderr)

    def exp(self) -> "Figure":
        """Of e to it: the error to first order."""
        value = float(torch.tensor(self.value, dtype=torch.float64).exp())
        return Figure(value, value * self.stderr)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Nats a token. Those of the original, and those beside it, are None where there was none.

    perplexity       e to the mean loss, the windows' beginnings unseen
    kl               of the original's distribution to this one's, mean over tokens
    delta_nll        this one's loss less the original's, paired
    top1_agreement   share of tokens whose likeliest successor is the same
    """

    weights: str
    num_windows: int
    window_len: int
    chunk_tokens: int
    perplexity: Figure
    original_weights: str | None = None
    original_perplexity: Figure | None = None
    kl: Figure | None = None
    delta_nll: Figure | None = None
    top1_agreement: Figure | None = None

    def as_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            if not isinstance(value, Figure):
                return value
            return {"value": value.value, "stderr": None if value.stderr != value.stderr else value.stderr}

        return {name: plain(getattr(self, name)) for name in self.__slots__}


def evaluate(
    model: Path,
    windows: Tensor,
    config: EngineConfig,
    *,
    against: Path | None = None,
    chunk_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """windows int64 [N, L] on the CPU; chunk_tokens: of one step, None: the engine's budget.

    The original runs first and leaves its last hidden states, so the two are never in memory together.
    Raises what `open_decoder` does, ConfigError for windows longer than the context, CheckpointError where the
    vocabularies differ, EngineError where logits are not numbers.
    """
    original = None
    if against is not None:
        as_numbers = config.but(quant_policy=0, kv_dtype="model")
        decoder, stored = open_decoder(against, as_numbers)
        chunk = _chunk_tokens(chunk_tokens, config, decoder)
        hidden = [
            rows.cpu()
            for i, rows in enumerate(_hidden(decoder, windows, chunk, as_numbers))
            if _tell(progress, "original", i + 1, len(windows))
        ]
        decoder.layers.clear()  # embedding, last norm and head stay
        original = (decoder, stored, hidden)
    config = under_engine_file(config, model)
    decoder, stored = open_decoder(model, config)
    if original is not None and original[0].config.vocab_size != decoder.config.vocab_size:
        raise CheckpointError(
            f"the vocabularies differ: {model} has {decoder.config.vocab_size} tokens, {against} has "
            f"{original[0].config.vocab_size}",
            "give the model that it was made from",
        )
    chunk = _chunk_tokens(chunk_tokens, config, decoder)
    losses = []
    for i, rows in enumerate(_hidden(decoder, windows, chunk, config)):
        reference = (original[0], original[2][i]) if original is not None else None
        losses.append(_window_losses(decoder, rows, windows[i], reference))
        _tell(progress, "model", i + 1, len(windows))
    nll, original_nll, kl, same = torch.tensor(losses, dtype=torch.float64).unbind(dim=1)
    if not bool(torch.isfinite(nll + original_nll + kl).all()):
        raise EngineError("the model's logits are not numbers", "its weights are damaged, or try --dtype float32")
    num_windows, window_len = windows.shape
    alone = Evaluation(stored, num_windows, window_len, chunk, Figure.of(nll).exp())
    if original is None:
        return alone
    return replace(
        alone,
        original_weights=original[1],
        original_perplexity=Figure.of(original_nll).exp(),
        kl=Figure.of(kl),
        delta_nll=Figure.of(nll - original_nll),
        top1_agreement=Figure.of(same),
    )


def _tell(progress: Progress | None, what: str, done: int, count: int) -> bool:
    if progress is not None:
        progress(what, done, count)
    return True


def _chunk_tokens(asked: int | None, config: EngineConfig, decoder: Decoder) -> int:
    if asked is not None and asked < 1:
        raise ConfigError(f"--chunk-tokens is {asked}", "give 1 token or more")
    return asked or batched_tokens(config, decoder.device)


# ------------------------------------------------------------------ a window through the cache
@torch.inference_mode()
def _hidden(decoder: Decoder, windows: Tensor, chunk_tokens: int, config: EngineConfig) -> Iterator[Tensor]:
    """For each window the residual stream after the last layer [L, H], on the decoder's device."""
    length = windows.shape[1]
    if length > len(decoder.cos_sin):
        raise ConfigError(
            f"--window-len is {length}, the model's context is {len(decoder.cos_sin)}", "give a smaller one"
        )
    blocks = -(-length // BLOCK_SIZE)
    plan = outline_plan(
        config,
        length,
        num_blocks=blocks + 1,  # block 0 is nobody's
        num_slots=1,
    )
    device = decoder.device
    with memory_short(f"no memory for a cache of {length} tokens on {device}", "give a smaller --window-len"):
        caches = allocate_cache(plan, decoder.config, decoder.dtype, device, decoder.kv_parameters)
    table = torch.arange(1, blocks + 1, device=device, dtype=torch.int32)[None]
    for ids in windows.to(device):
        rows = []
        for first in range(0, length, chunk_tokens):
            last = min(first + chunk_tokens, length)
            positions = torch.arange(first, last, device=device)
            context = AttentionContext(
                num_decode=0,
                positions=positions,
                slots=positions + BLOCK_SIZE,
                seq_lens=torch.tensor([last], dtype=torch.int32, device=device),
                block_tables=table[:, : -(-last // BLOCK_SIZE)].contiguous(),
                seq_slots=torch.zeros(1, dtype=torch.int32, device=device),
                cu_seqlens_q=torch.tensor([0, last - first], dtype=torch.int32, device=device),
                max_seqlen_q=last - first,
            )
            rows.append(decoder.forward(ids[first:last], context, caches))
        yield torch.cat(rows)


@torch.inference_mode()
def _window_losses(
    decoder: Decoder, hidden: Tensor, ids: Tensor, original: tuple[Decoder, Tensor] | None
) -> tuple[float, float, float, float]:
    """Means over the L - 1 predicted tokens: loss, the original's loss, KL, share of equal likeliest tokens."""
    sums = torch.zeros(4, dtype=torch.float64)
    num_predicted = len(ids) - 1
    step = max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size)
    targets = ids[1:].to(hidden.device)[:, None]
    for first in range(0, num_predicted, step):
        rows = slice(first, min(first + step, num_predicted))
        logprobs = torch.log_softmax(decoder.logits(hidden[rows]), dim=-1)
        sums[0] -= float(logprobs.gather(1, targets[rows]).sum())
        if original is not None:
            expected = torch.log_softmax(original[0].logits(original[1][rows].to(hidden.device)), dim=-1)
            sums[1] -= float(expected.gather(1, targets[rows]).sum())
            sums[3] += int((expected.argmax(dim=-1) == logprobs.argmax(dim=-1)).sum())
            sums[2] += float(expected.exp().mul_(expected.sub_(logprobs)).sum())
    loss, original_loss, kl, same = (sums / num_predicted).tolist()
    return loss, original_loss, kl, same


def spread(ids: Tensor, num_windows: int, window_len: int) -> Tensor:
    """``num_windows`` of ``window_len`` tokens [N, L], evenly over ids [T], none overlapping. Raises ConfigError."""
    if num_windows < 1 or window_len < 2:
        raise ConfigError(
            f"--windows is {num_windows} and --window-len {window_len}", "give 1 window or more, of 2 tokens or more"
        )
    fits = len(ids) // window_len
    if fits < num_windows:
        raise ConfigError(
            f"the text has {len(ids):,} tokens, {num_windows} windows of {window_len} are {num_windows * window_len:,}",
            f"give more text, or --windows {fits}" if fits else "give more text, or a shorter --window-len",
        )
    first = [i * fits // num_windows * window_len for i in range(num_windows)]
    return torch.stack([ids[start : start + window_len] for start in first])
