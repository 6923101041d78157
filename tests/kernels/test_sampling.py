"""Sampling and penalties: Triton against the reference, and both against what the probabilities promise."""

import pytest
import torch
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.reference import sampling as reference
from lmtool.kernels.triton import sampling as triton_sampling
from tests.kernels.support import normal


def settings(num_rows: int, device: torch.device, **values: float) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seeds, steps: `values` for every row, seeds and steps all different."""
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **values}
    dtypes = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    rows = [torch.full((num_rows,), full[name], dtype=dtype, device=device) for name, dtype in dtypes.items()]
    seeds = torch.arange(num_rows, device=device) * 0x123456789AB - 3
    return *rows, seeds, torch.arange(num_rows, device=device) + 7


RESTRICTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40, "temperature": 1.5},
    {"top_p": 0.9, "temperature": 0.8},
    {"top_p": 0.0001},
    {"min_p": 0.2},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.2},
    {"top_k": 2400, "top_p": 0.99},  # more than the candidates that are gathered
    {"top_k": 100000},  # more than there are: off
]


@pytest.mark.parametrize("values", RESTRICTIONS, ids=str)
@pytest.mark.parametrize("scale", [0.01, 4.0])
def test_the_same_tokens_as_the_reference(values, scale, device):
    logits = normal(2, 5000, dtype=torch.float32, device=device, scale=scale)
    logits[0, ::7] = -torch.inf
    arguments = (logits, *settings(2, device, **values))
    assert torch.equal(triton_sampling.sample(*arguments), reference.sample(*arguments))


def test_rows_with_different_settings_do_not_meet(device):
    logits = normal(len(RESTRICTIONS), 900, dtype=torch.float32, device=device, scale=3)
    rows = [settings(1, device, **values) for values in RESTRICTIONS]
    together = triton_sampling.sample(logits, *(torch.cat(parts) for parts in zip(*rows, strict=True)))
    alone = [triton_sampling.sample(logits[i : i + 1], *row) for i, row in enumerate(rows)]
    assert torch.equal(together, torch.cat(alone))


def test_equal_logits_tie_at_the_threshold_and_are_all_kept(device):
    logits = torch.ones(20, 4, device=device)
    logits[:, 0] = 5.0
    ids = triton_sampling.sample(logits, *settings(20, device, top_k=2, temperature=20.0))
    assert set(ids.tolist()) == set(range(4))


@pytest.mark.parametrize("values", [{"top_k": 20}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.5}], ids=str)
def test_more_equal_logits_than_candidates_fit(values, device):
    logits = torch.zeros(1, 5000, device=device)
    logits[:, :5] = torch.tensor([3.0, -torch.inf, 2.0, -4.0, 2.0], device=device)
    arguments = (logits, *settings(1, device, **values))
    assert torch.equal(triton_sampling.sample(*arguments), reference.sample(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_logits(dtype, device):
    logits = normal(2, 700, dtype=dtype, device=device, scale=3)
    restrictions = settings(2, device, top_k=20, top_p=0.9)
    expected = reference.sample(logits.float(), *restrictions)
    assert torch.equal(triton_sampling.sample(logits, *restrictions), expected)


def test_frequencies_follow_the_probabilities(device):
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    rows = 60 if device.type == "cpu" else 20000
    logits = probabilities.log().repeat(rows, 1).to(device)
    counts = torch.bincount(triton_sampling.sample(logits, *settings(rows, device)).cpu(), minlength=4)
    # five standard deviations of a binomial count
    bound = 5 * (rows * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - rows * probabilities).abs() < bound).all()


def test_noise_is_never_infinite():
    largest = torch.tensor(0xFFFFFFFF)
    uniform = ((largest >> 9).float() + 0.5) * 2.0**-23
    assert torch.isfinite(-torch.log(-torch.log(uniform)))


@pytest.mark.gpu
@pytest.mark.parametrize("values", RESTRICTIONS, ids=str)
def test_a_real_vocabulary(values, device):
    logits = normal(64, 128256, dtype=torch.float32, device=device, scale=2)
    arguments = (logits, *settings(64, device, **values))
    same = triton_sampling.sample(*arguments) == reference.sample(*arguments)
    assert same.float().mean() > 0.96  # logarithms of the card and of torch differ in the last bit: near ties may flip


@pytest.mark.gpu
def test_one_graph_serves_any_settings(device):
    rows = [settings(1, device, **values) for values in RESTRICTIONS]
    together = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    logits, given = torch.zeros(len(rows), 128256, device=device), [torch.zeros_like(part) for part in together]
    triton_sampling.sample(logits, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = triton_sampling.sample(logits, *given)
    for scale in (0.01, 3.0):
        logits.copy_(normal(*logits.shape, dtype=logits.dtype, device=device, scale=scale))
        for part, new in zip(given, together, strict=True):
            part.copy_(new)
        first = triton_sampling.sample(logits, *given)
        for _ in range(3):  # nothing depends on which program comes last
            graph.replay()
            assert torch.equal(ids, first)


def test_penalize(device):
    logits = normal(4, 5000, dtype=torch.float32, device=device, scale=3)
    prompt_mask = torch.rand(4, 5000, device=device) < 0.2
    counts = (torch.rand(4, 5000, device=device) * 4).int()
    repetition = torch.tensor([1.0, 1.3, 0.8, 1.0], device=device)
    presence = torch.tensor([0.0, 0.5, 0.0, -0.4], device=device)
    frequency = torch.tensor([0.0, 0.0, 0.3, 0.1], device=device)
    arguments = (prompt_mask, counts, repetition, presence, frequency)
    expected = reference.penalize_(logits.clone(), *arguments)
    returned = triton_sampling.penalize_(logits, *arguments)
    assert returned.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("vocab_size", [31, 32, 4097, 9000])
def test_mask(vocab_size, device):
    logits = normal(6, vocab_size, dtype=torch.float32, device=device)
    rows = torch.tensor([4, 0, 3], dtype=torch.int32, device=device)
    words = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), dtype=torch.int32)
    words[2] = 0
    expected = logits.cpu().clone()
    for row, of_row in zip(rows.tolist(), words.tolist(), strict=True):
        for token in range(vocab_size):
            if not of_row[token // 32] >> token % 32 & 1:
                expected[row, token] = -torch.inf
    for module in (reference, triton_sampling):
        masked = logits.clone()
        assert module.mask_(masked, rows, words.to(device)) is masked
        assert torch.equal(masked.cpu(), expected)
    assert torch.equal(triton_sampling.mask_(logits.clone(), rows[:0], words[:0].to(device)), logits)


def test_half_precision_logits_are_not_masked_in_place(device):
    rows = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match="float32"):
        triton_sampling.mask_(torch.zeros(1, 4, device=device).half(), rows, rows[None])


def test_half_precision_logits_are_not_penalized_in_place(device):
    with pytest.raises(KernelError, match="float32"):
        triton_sampling.penalize_(torch.zeros(1, 4, device=device).half(), *[torch.zeros(1, 4, device=device)] * 5)
