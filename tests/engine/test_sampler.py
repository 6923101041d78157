"""Sampling: the right distribution, exactly the tokens that the limits leave, penalties and biases as documented."""

import math

import numpy as np
import pytest
import torch

from lmtool import kernels
from lmtool.engine.batch import Batch, Join, Mask
from lmtool.engine.sampler import Sampler
from tests.support import request

VOCAB = 40


def rows(value: float, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((count,), value, dtype=dtype)


def draw(logits: torch.Tensor, count: int, **limits: float) -> np.ndarray:
    """How often each token comes out of ``count`` draws with different seeds."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **limits}
    ids = kernels.sample(
        logits.expand(count, -1).clone(),
        rows(values["temperature"], count),
        rows(values["top_k"], count, torch.int32),
        rows(values["top_p"], count),
        rows(values["min_p"], count),
        torch.arange(count) * 0x9E3779B97F4A7C15 % 2**62,
        torch.zeros(count, dtype=torch.int64),
    )
    return np.bincount(ids.numpy(), minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax(temperature: float) -> None:
    logits = torch.randn(VOCAB) * 2
    count = 4000
    expected = torch.softmax(logits / temperature, 0).numpy() * count
    observed = draw(logits, count, temperature=temperature)
    common = expected > 5
    chi2 = (((observed - expected) ** 2) / expected)[common].sum()
    # mean + 5 standard deviations of chi-square
    degrees = common.sum()
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.7}])
def test_limits_leave_exactly_the_tokens_they_should(limits: dict[str, float]) -> None:
    logits = torch.randn(VOCAB) * 2
    probabilities, order = torch.softmax(logits, 0).sort(descending=True)
    kept = set(range(VOCAB))
    if "top_k" in limits:
        kept &= set(range(int(limits["top_k"])))
    if "top_p" in limits:
        of_kept = probabilities[sorted(kept)] / probabilities[sorted(kept)].sum()
        before = of_kept.cumsum(0) - of_kept
        kept = {i for i in kept if before[i] < limits["top_p"]}
    if "min_p" in limits:
        kept &= {i for i in range(VOCAB) if probabilities[i] >= limits["min_p"] * probabilities[0]}
    observed = draw(logits, 1500, **limits)
    assert set(np.flatnonzero(observed)) == {int(order[i]) for i in kept}


def test_top_p_over_a_flat_vocabulary_keeps_its_share() -> None:
    """More candidates than are sorted at first: the whole vocabulary is sorted then."""
    logits = torch.linspace(0, 1e-3, 3000)
    observed = draw(logits, 400, top_p=0.5)
    assert np.flatnonzero(observed).min() >= 1490
    assert np.flatnonzero(observed).max() > 2900


def test_the_same_seed_and_step_give_the_same_token_and_others_do_not() -> None:
    logits = torch.zeros(1, 1000)
    one = rows(1.0, 1)

    def token(seed: int, step: int) -> int:
        none = rows(0.0, 1)
        ids = kernels.sample(logits, one, none.int(), one, none, torch.tensor([seed]), torch.tensor([step]))
        return int(ids)

    assert token(5, 0) == token(5, 0)
    assert len({token(5, step) for step in range(200)}) > 150
    assert len({token(seed << 32, 0) for seed in range(200)}) > 150  # the upper half of a seed counts


def sampled(
    logits: torch.Tensor,
    steps: int = 1,
    bans: list[tuple[int, int]] | None = None,
    masks: list[Mask] | None = None,
    **settings: object,
):  # noqa: ANN201
    sampler = Sampler(4, VOCAB, torch.device("cpu"))
    sampler.join(Join(2, request(0, [1, 2, 2, 3], **settings)))
    batch = Batch(decodes=[2], bans=bans or [], masks=masks or [])
    return [sampler.sample(logits.clone()[None], batch) for _ in range(steps)]


def test_penalties() -> None:
    logits = torch.zeros(VOCAB)
    logits[2], logits[3], logits[9], logits[5] = 3.0, -1.0, 2.0, 1.7
    out = sampled(logits, repetition_penalty=2.0, logprobs=4)[0].logprobs[2]
    # 2 and 3 are in the prompt: 3/2 and -1·2; 9 is not
    assert [i for i, _ in out.top[:3]] == [9, 5, 2]
    assert out.top[0][1] - out.top[2][1] == pytest.approx(2.0 - 1.5, abs=1e-5)
    # presence and frequency look at the answer only
    tokens = [o.token_ids[0] for o in sampled(logits, steps=4, presence_penalty=0.5, frequency_penalty=1.0)]
    assert tokens == [2, 9, 5, 2]


def test_bias_bans_and_held_back_stops() -> None:
    logits = torch.zeros(VOCAB)
    logits[4], logits[6] = 2.0, 1.0
    assert sampled(logits, logit_bias={7: 5.0})[0].token_ids == [7]
    assert sampled(logits, bans=[(2, 4)])[0].token_ids == [6]
    held = sampled(logits, steps=3, stop_token_ids=(4,), min_new_tokens=2)
    assert [o.token_ids[0] for o in held] == [6, 6, 4]


def test_logprobs_are_log_softmax() -> None:
    logits = torch.randn(VOCAB)
    reported = sampled(logits, logprobs=3, temperature=0.5)[0]
    expected = torch.log_softmax(logits, 0)
    chosen = reported.logprobs[2]
    assert chosen.token_id == reported.token_ids[0]
    assert chosen.logprob == pytest.approx(float(expected[chosen.token_id]), abs=1e-5)
    values, ids = expected.topk(3)
    assert [i for i, _ in chosen.top] == ids.tolist()
    assert [v for _, v in chosen.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert sampled(logits)[0].logprobs == {}


def mask(*ids: int, only_ends: bool = False) -> Mask:
    bits = np.zeros(64, dtype=np.uint8)
    bits[list(ids)] = 1
    return Mask(2, np.packbits(bits, bitorder="little").tobytes(), only_ends)


def test_a_mask_leaves_what_it_allows_whatever_else_is_asked() -> None:
    logits = torch.zeros(VOCAB)
    logits[4], logits[6], logits[7] = 3.0, 2.0, 1.0
    assert sampled(logits, masks=[mask(6, 7, 63)])[0].token_ids == [6]
    assert sampled(logits, masks=[mask(6, 7)], bans=[(2, 6)])[0].token_ids == [7]
    assert sampled(logits, masks=[mask(6, 7)], logit_bias={4: 100.0, 7: 5.0})[0].token_ids == [7]
    drawn = {sampled(logits, masks=[mask(6, 7)], temperature=50.0, seed=seed)[0].token_ids[0] for seed in range(40)}
    assert drawn == {6, 7}
    scored = sampled(logits, masks=[mask(6, 7)], logprobs=5)[0].logprobs[2]
    assert [i for i, _ in scored.top] == [6, 7]
    assert sum(math.exp(value) for _, value in scored.top) == pytest.approx(1.0)


def test_a_grammar_that_must_end_ends_though_stops_are_held_back() -> None:
    logits = torch.zeros(VOCAB)
    held = {"stop_token_ids": (4,), "min_new_tokens": 9}
    assert sampled(logits, masks=[mask(4, 6)], **held)[0].token_ids == [6]
    assert sampled(logits, masks=[mask(4, only_ends=True)], **held)[0].token_ids == [4]
