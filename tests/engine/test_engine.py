"""The engine over a tiny random decoder: however requests share it, each answer is what it is alone."""

import pytest
import torch

from tests.support import all_logits, check_equal, check_greedy, request, run_all, tiny_core, tiny_decoder

GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = {i: torch.randint(0, 211, (5 + 37 * i,), generator=GENERATOR).tolist() for i in range(6)}
REQUESTS = [request(i, prompt, max_new_tokens=40) for i, prompt in PROMPTS.items()]


@pytest.fixture(scope="module")
def decoder():  # noqa: ANN201
    return tiny_decoder()


@pytest.fixture(scope="module")
def alone(decoder) -> dict[int, list[int]]:  # noqa: ANN001
    return {r.request_id: run_all(tiny_core(decoder, prefix_caching=False), [r])[r.request_id] for r in REQUESTS}


def test_greedy_equals_a_plain_loop(decoder, alone) -> None:  # noqa: ANN001
    compared = 0
    for i, prompt in PROMPTS.items():
        logits = all_logits(decoder, [*prompt, *alone[i]])[len(prompt) - 1 : -1]
        compared += check_greedy(alone[i], logits)
    assert compared >= 0.9 * 40 * len(PROMPTS)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"prefix_caching": False}, id="batched"),
        pytest.param({"max_batched_tokens": 64}, id="chunked"),
        pytest.param({"prefix_caching": True}, id="prefix cache on"),
        pytest.param({"num_blocks": 14}, id="preempted"),
        pytest.param({"max_batch_size": 2}, id="queued"),
    ],
)
def test_answers_do_not_depend_on_how_they_are_scheduled(settings, decoder, alone) -> None:  # noqa: ANN001
    core = tiny_core(decoder, **{"session_len": 320, **settings})
    together = run_all(core, REQUESTS)
    again = run_all(core, REQUESTS)
    check_equal(alone, together, decoder, PROMPTS)
    check_equal(alone, again, decoder, PROMPTS)
    if settings.get("prefix_caching"):  # full blocks, and at least one partly filled one
        full_blocks = sum((len(p) - 1) // 64 * 64 for p in PROMPTS.values())
        assert core.scheduler.counters.num_cached_tokens > full_blocks
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_answers_equal_undisturbed_ones(prefix_caching: bool, decoder) -> None:  # noqa: ANN001
    requests = [request(i, PROMPTS[i], max_new_tokens=150) for i in range(4)]
    undisturbed = tiny_core(decoder, session_len=320)
    core = tiny_core(decoder, session_len=320, num_blocks=10, prefix_caching=prefix_caching)
    check_equal(run_all(undisturbed, requests), run_all(core, requests), decoder, PROMPTS)
    assert undisturbed.scheduler.counters.num_preemptions == 0
    assert core.scheduler.counters.num_preemptions > 0


def test_sampling_does_not_depend_on_what_shares_the_batch(decoder) -> None:  # noqa: ANN001
    varied = [
        request(0, PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=7),
        request(1, PROMPTS[1], max_new_tokens=20, temperature=0.7, top_k=5, seed=1, repetition_penalty=1.3),
        request(2, PROMPTS[2], max_new_tokens=20),
        request(3, PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=8, top_p=0.9),
        request(4, PROMPTS[3], max_new_tokens=20, temperature=1.5, min_p=0.1, seed=2, frequency_penalty=0.5),
    ]
    together = run_all(tiny_core(decoder), varied)
    for one in varied:
        assert run_all(tiny_core(decoder), [one])[one.request_id] == together[one.request_id]
    assert together[0] != together[3]


def test_abort_frees_everything_at_once(decoder) -> None:  # noqa: ANN001
    core = tiny_core(decoder)
    for one in REQUESTS:
        core.add(one)
    core.step()
    core.step()
    for one in REQUESTS:
        output = core.abort(one.request_id)
        assert output is not None
        assert output.finish_reason == "abort"
    assert not core.has_work
    core.scheduler.blocks.check_integrity([])


def test_logits_that_are_not_numbers_end_the_requests_with_the_cause() -> None:
    broken = tiny_decoder()
    broken.final_norm[3] = torch.nan
    core = tiny_core(broken)
    core.add(REQUESTS[0])
    outputs = core.step()
    assert [o.finish_reason for o in outputs] == ["error"]
    assert "logits are not numbers; its weights are damaged" in str(outputs[0].error)
    assert not core.has_work
