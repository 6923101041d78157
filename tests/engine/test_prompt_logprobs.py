"""Log-probabilities of a prompt's tokens: transformers', however the prompt is cut, shared, preempted or stored."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmtool.engine import prompt_logprobs
from lmtool.engine.core import EngineCore
from lmtool.engine.sequence import Request, TokenLogprob
from lmtool.errors import EngineError, RequestError
from lmtool.models.decoder import Decoder
from tests.engine.test_device_runner import Late, device_core
from tests.models.test_against_hf import hf_model, load
from tests.support import all_logits, collect, request, run_all, tiny_core, tiny_decoder

GENERATOR = torch.Generator().manual_seed(3)
LENGTHS = (1, 2, 64, 65, 130, 200)
PROMPTS = {i: torch.randint(0, 131, (n,), generator=GENERATOR).tolist() for i, n in enumerate(LENGTHS)}
SCORED = [request(i, prompt, max_new_tokens=3, prompt_logprobs=i % 4) for i, prompt in PROMPTS.items()]


def scores_of(core: EngineCore, requests: Sequence[Request]) -> dict[int, tuple[TokenLogprob, ...] | None]:
    """What came with each request's first token, and only with that."""
    for one in requests:
        core.add(one)
    found: dict[int, tuple[TokenLogprob, ...] | None] = {}
    while core.has_work:
        for output in core.step():
            assert output.error is None
            if output.request_id in found:
                assert output.prompt_logprobs is None
            found.setdefault(output.request_id, output.prompt_logprobs)
    return found


def check_scores(
    found: tuple[TokenLogprob, ...] | None,
    prompt: Sequence[int],
    logits: torch.Tensor,
    num_top: int,
    atol: float = 1e-4,
) -> None:
    """logits [len(prompt), V]. The likeliest are compared by their logprobs: near ties may change places."""
    assert found is not None
    assert [one.token_id for one in found] == list(prompt[1:])
    expected = torch.log_softmax(logits[: len(prompt) - 1].float(), -1)
    for one, row in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=atol)
        assert [value for _, value in one.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=atol)
        assert [float(row[i]) for i, _ in one.top] == pytest.approx([value for _, value in one.top], abs=atol)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> dict[int, torch.Tensor]:
    return {i: all_logits(decoder, prompt) for i, prompt in PROMPTS.items()}


@pytest.mark.parametrize("case", [("Llama", {}), ("Qwen3", {"head_dim": 32, "use_sliding_window": False})], ids=str)
def test_they_are_those_of_transformers(case: tuple[str, dict[str, object]], tmp_path: Path) -> None:
    model = hf_model(case[0], max_position_embeddings=512, **case[1])
    model.save_pretrained(tmp_path)
    found = scores_of(tiny_core(load(tmp_path, 256), max_batched_tokens=96, session_len=256), SCORED)
    for i, prompt in PROMPTS.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0]
        check_scores(found[i], prompt, logits, i % 4)
    assert found[0] == ()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("settings", [{}, {"budget": 64}], ids=str)
def test_however_they_are_scheduled(on_device: bool, settings: dict[str, int], decoder, expected, monkeypatch) -> None:  # noqa: ANN001
    """Beside others that ask for nothing, twice: what the first run left behind is not read."""
    monkeypatch.setattr(prompt_logprobs, "_PIECE_BYTES", 4 * 211 * 7)  # seven rows at a time
    if on_device:
        core = device_core(decoder, Late, **settings)
    else:
        names = {"budget": "max_batched_tokens"}
        core = tiny_core(decoder, **{names.get(name, name): value for name, value in settings.items()})
    others = [request(10 + i, prompt, max_new_tokens=30) for i, prompt in PROMPTS.items()]
    for _ in range(2):
        found = scores_of(core, [one for pair in zip(SCORED, others, strict=True) for one in pair])
        for i, prompt in PROMPTS.items():
            check_scores(found[i], prompt, expected[i], i % 4)
            assert found[10 + i] is None
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("on_device", [False, True])
def test_preempted_in_the_middle_of_its_prompt(on_device: bool, prefix_caching: bool, decoder, expected) -> None:  # noqa: ANN001
    """What was read before is kept: with a cache only what is missing is computed, and never is anything told twice."""
    if on_device:
        core = device_core(decoder, Late, budget=64, num_blocks=6, session_len=220, prefix=prefix_caching)
    else:
        core = tiny_core(decoder, max_batched_tokens=64, num_blocks=6, session_len=220, prefix_caching=prefix_caching)
    for i in range(2):
        core.add(request(10 + i, [i] * 60, max_new_tokens=100))
    core.add(SCORED[5])
    found, read_before = None, set()  # how many had been read when it waited to start again
    while core.has_work:
        for output in core.step():
            assert output.error is None
            found = output.prompt_logprobs or found
        sequence = core._sequences.get(5)
        if sequence is not None and sequence.num_preemptions and sequence.slot < 0:
            read_before.add(len(sequence.prompt_logprobs or ()))
    check_scores(found, PROMPTS[5], expected[5], 1)
    assert any(0 < number < 199 for number in read_before)
    core.scheduler.blocks.check_integrity([])


def test_the_logits_of_a_long_chunk_are_made_a_few_rows_at_a_time(decoder, expected, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setattr(prompt_logprobs, "_PIECE_BYTES", 4 * 211 * 50)
    rows = []
    logits = Decoder.logits

    def counted(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "logits", counted)
    check_scores(scores_of(tiny_core(decoder), SCORED[5:])[5], PROMPTS[5], expected[5], 1)
    assert sorted(rows) == [1, 1, 1, 49, 50, 50, 50]


def test_nothing_of_the_prompt_comes_from_the_cache_and_all_of_it_goes_there(decoder) -> None:  # noqa: ANN001
    core = tiny_core(decoder)
    for one in (SCORED[5], replace(SCORED[5], request_id=6)):
        scores_of(core, [one])
        assert core.scheduler.counters.num_cached_tokens == 0
    run_all(core, [request(7, PROMPTS[5], max_new_tokens=1)])
    assert core.scheduler.counters.num_cached_tokens == 199


def test_an_int8_cache_costs_its_own_error(decoder, expected) -> None:  # noqa: ANN001
    own = all_logits(decoder, PROMPTS[5], kv_dtype="int8")
    found = scores_of(tiny_core(decoder, kv_dtype="int8", max_batched_tokens=64), SCORED)[5]
    check_scores(found, PROMPTS[5], own, 1, atol=2e-3)
    with pytest.raises(AssertionError):
        check_scores(found, PROMPTS[5], expected[5], 1, atol=1e-6)


def test_the_answer_and_its_own_logprobs_stay_what_they_are(decoder) -> None:  # noqa: ANN001
    plain = request(0, PROMPTS[4], max_new_tokens=8, temperature=1.0, seed=5, logprobs=2, repetition_penalty=1.2)
    asked = replace(plain, params=replace(plain.params, prompt_logprobs=3))
    outputs = []
    for one in (plain, asked):
        core = tiny_core(decoder)
        core.add(one)
        outputs.append([o.logprob for _ in range(8) for o in core.step()])
    assert [o.token_id for o in outputs[0]] == [o.token_id for o in outputs[1]]
    assert [o.logprob for o in outputs[0]] == pytest.approx([o.logprob for o in outputs[1]], abs=1e-5)


def test_aborted_in_the_middle_of_its_prompt(decoder) -> None:  # noqa: ANN001
    core = device_core(decoder, Late, budget=64)
    core.add(SCORED[5])
    core.step()
    core.step()
    assert core.abort(5) is not None
    answers: dict[int, list[int]] = {7: []}
    core.add(request(7, PROMPTS[5], max_new_tokens=2))
    while core.has_work:
        collect(core.step(), answers)
    assert len(answers[7]) == 2
    core.scheduler.blocks.check_integrity([])


def test_scores_that_are_not_numbers_end_the_request_alone(decoder, monkeypatch) -> None:  # noqa: ANN001
    score = prompt_logprobs.score

    def broken(decoder: Decoder, hidden: torch.Tensor, *args: object) -> prompt_logprobs.Scores:
        hidden[3] = torch.nan
        return score(decoder, hidden, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("lmtool.engine.device_runner.score", broken)
    core = device_core(decoder)
    core.add(SCORED[4])
    core.add(request(9, PROMPTS[4], max_new_tokens=3))
    outputs = []
    while core.has_work:
        outputs += core.step()
    assert [type(o.error) for o in outputs if o.request_id == 4] == [EngineError]
    assert len([o for o in outputs if o.request_id == 9 and o.token_id is not None]) == 3
    core.scheduler.blocks.check_integrity([])


def test_how_many_may_be_asked_for() -> None:
    with pytest.raises(RequestError, match="--prompt-logprobs is 21; give 0 to 20"):
        request(0, [1], prompt_logprobs=21)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, expected: dict[int, torch.Tensor]) -> None:
    from tests.engine.test_graphs import gpu_core, gpu_decoder

    core = gpu_core(gpu_decoder(dtype), max_batched_tokens=96)
    for _ in range(2):
        found = scores_of(core, SCORED)
        for i, prompt in PROMPTS.items():
            check_scores(found[i], prompt, expected[i], i % 4, atol=1e-4 if dtype == torch.float32 else 2e-2)
