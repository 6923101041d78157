"""What a quantized K/V cache loses on SmolLM2: the bars of docs/kv-cache.md, on one window of text it has not seen.

Computed in chunks of a block, so that what is read back is what is measured. `lmtool lite eval` measures more of it.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from lmtool.bench import evaluate
from lmtool.checkpoint.hub import resolve_model
from lmtool.commands.lite_eval import evaluation_ids
from lmtool.config import EngineConfig
from lmtool.engine.load_weights import open_decoder
from lmtool.kernels.kv_layout import quantize
from lmtool.layers.context import AttentionContext
from lmtool.layers.kv_store import DenseKv
from lmtool.models.decoder import Decoder


@cache
def decoder() -> Decoder:
    return open_decoder(resolve_model("smollm2-135m"), EngineConfig(device="cpu", dtype="float32"))[0]


@cache
def window() -> Tensor:
    return evaluation_ids(resolve_model("smollm2-135m"), None, None, 3, 512)[1:2]


@cache
def logprobs(kv_dtype: str) -> Tensor:
    (hidden,) = evaluate._hidden(decoder(), window(), 64, EngineConfig(kv_dtype=kv_dtype))
    with torch.inference_mode():
        return torch.log_softmax(decoder().logits(hidden), -1)


def kl(kv_dtype: str) -> float:
    exact = logprobs("model")
    return float((exact.exp() * (exact - logprobs(kv_dtype))).sum(-1).mean())


class PlainInt4(DenseKv):
    """What int4 is measured against: K and V in 4 bits of each token and head, every token of them."""

    def write(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        step: AttentionContext,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        q = super().write(qkv, cos_sin, step, q_norm, k_norm, eps)
        for part in (self.k, self.v):
            tokens = part.flatten(1, 2)
            codes, scale, low = quantize(tokens[:, step.slots], 4, -1)
            tokens[:, step.slots] = codes * scale.float() + low.float()
        return q


def plain_int4(monkeypatch: pytest.MonkeyPatch) -> float:
    allocate = evaluate.allocate_cache

    def plain(*args: object) -> list[PlainInt4]:
        return [PlainInt4(store.k, store.v) for store in allocate(*args)]  # type: ignore[attr-defined, arg-type]

    exact = logprobs("model")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "allocate_cache", plain)
        (hidden,) = evaluate._hidden(decoder(), window(), 64, EngineConfig())
    with torch.inference_mode():
        lost = torch.log_softmax(decoder().logits(hidden), -1)
    return float((exact.exp() * (exact - lost)).sum(-1).mean())


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 5e-4), ("k8v4", 0.012)])
def test_eight_bits_and_k8v4_lose_no_more_than_is_said(kv_dtype: str, most: float) -> None:
    assert 0 < kl(kv_dtype) <= most


def test_four_bits_lose_a_fraction_of_what_plain_four_bits_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_int4(monkeypatch)
    assert plain > 0.01
    assert 0 < kl("int4") <= 0.1 * plain
