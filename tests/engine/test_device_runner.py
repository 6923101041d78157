"""The engine that keeps its state on a device, run on a CPU: the same launches, done at once.

Whatever shares a step, and however late a step is read, each answer is what it is alone on the plain path.
`test_graphs` has the same on a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmtool.config import EngineConfig
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.device_state import DeviceState
from lmtool.engine.executor import LocalExecutor
from lmtool.engine.graphs import Graphs, bucket_sizes
from lmtool.engine.kv_cache import BLOCK_SIZE, outline_plan
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.sequence import Request
from lmtool.engine.transfer import upload
from lmtool.errors import EngineError
from lmtool.models.decoder import Decoder
from tests.support import (
    check_equal,
    collect,
    request,
    run_all,
    tiny_core,
    tiny_decoder,
)

GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = {i: torch.randint(0, 211, (5 + 37 * i,), generator=GENERATOR).tolist() for i in range(6)}
REQUESTS = [request(i, prompt, max_new_tokens=40) for i, prompt in PROMPTS.items()]
SAMPLED = [
    request(0, PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=7),
    request(1, PROMPTS[1], max_new_tokens=20, temperature=0.7, top_k=5, seed=2**62 + 1),
    request(2, PROMPTS[2], max_new_tokens=20),
    request(3, PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=8, top_p=0.9),
    request(4, PROMPTS[3], max_new_tokens=20, temperature=1.5, min_p=0.1, seed=2),
]
# each of these keeps a step from being a graph's
SPECIAL = [
    request(0, PROMPTS[0], max_new_tokens=20, temperature=0.7, seed=1, repetition_penalty=1.3, logprobs=2),
    request(1, PROMPTS[1], max_new_tokens=20, frequency_penalty=0.5, presence_penalty=0.2),
    request(2, PROMPTS[2], max_new_tokens=20, logit_bias={7: 5.0, 9: 4.5}),
    request(3, PROMPTS[3], max_new_tokens=20, bad_ids=((11, 12), (13,))),
    request(4, PROMPTS[4], max_new_tokens=20),
    request(5, PROMPTS[0], max_new_tokens=20, min_new_tokens=12, stop_token_ids=tuple(range(0, 211, 2))),
]


class Late(DeviceRunner):
    """Several steps may be launched and unread."""

    depth = 3


class Captured(dict):  # type: ignore[type-arg]
    """Graphs that do their work when they are replayed: a CPU's."""

    def __init__(self, graphs: Graphs) -> None:
        super().__init__(dict.fromkeys(graphs._largest_first()))
        self._work = graphs._work
        self.sizes: list[tuple[int, ...]] = []

    def __getitem__(self, size: tuple[int, ...]) -> tuple["Captured", torch.Tensor]:
        self.sizes.append(size)
        return self, self._work(*size)

    def replay(self) -> None:
        """It is done."""


def device_core(
    decoder: Decoder, kind: type[DeviceRunner] = DeviceRunner, kv_dtype: str = "model", **settings: int
) -> EngineCore:
    """What `build_core` makes on a GPU, here on a CPU."""
    given = {"num_blocks": 60, "batch": 8, "budget": 512, "session_len": 320, "prefix": 1, "padded": 0, **settings}
    config = EngineConfig(kv_dtype=kv_dtype, max_batch_size=given["batch"])
    plan = outline_plan(config, given["session_len"], num_blocks=given["num_blocks"])
    prefix_caching = bool(given["prefix"])
    blocks = BlockManager(plan.num_blocks, plan.block_size, prefix_caching=prefix_caching, keep_tails=plan.keeps_tails)
    scheduler = Scheduler(blocks, max_batch_size=given["batch"], max_batched_tokens=given["budget"], join_group=2)
    runner = kind(decoder, plan, max_batch_size=given["batch"])
    if given["padded"]:  # as if it had been captured
        for graphs in (runner._steps.of_prompts, runner._steps.of_both):
            graphs._captured = Captured(graphs)
    return EngineCore(scheduler, LocalExecutor(runner), session_len=plan.session_len)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[int, list[int]]:
    return {r.request_id: run_all(tiny_core(decoder, prefix_caching=False), [r])[r.request_id] for r in REQUESTS}


# ---------------------------------------------------------------------- state
def test_buckets_cover_every_batch_with_little_padding() -> None:
    assert bucket_sizes(256)[:6] == [1, 2, 4, 8, 16, 24]
    assert bucket_sizes(256)[-2:] == [240, 256]
    assert bucket_sizes(512)[-2:] == [480, 512]
    for most in (1, 3, 6, 8, 100, 256, 600, 4096):
        sizes = bucket_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most


def test_only_changes_are_sent() -> None:
    state = DeviceState(6, 6, 5, BLOCK_SIZE, torch.device("cpu"))

    def send() -> int:
        changes = state.changes()
        if changes:
            state.write(*upload(changes, torch.device("cpu")))
        return len(changes[0]) if changes else 0

    state.set_rows([3, 1])
    assert send() == 2
    assert state.rows.tolist() == [3, 1, -1, -1, -1, -1]
    assert send() == 0
    state.set_rows([3, 1])
    assert send() == 0
    state.set_rows([1])
    assert send() == 2
    assert state.rows.tolist() == [1, -1, -1, -1, -1, -1]


def test_what_was_not_written_is_sent_again() -> None:
    state = DeviceState(6, 6, 5, BLOCK_SIZE, torch.device("cpu"))
    state.set_rows([2])
    state.changes()  # and then the copy fails
    assert len(state.changes()[0]) == 1


def test_arrays_travel_together_and_arrive_whole() -> None:
    arrays = [np.arange(5, dtype=np.int64), np.arange(3, dtype=np.int32)[:0], np.ones((2, 3), dtype=np.float32)]
    for there, here in zip(upload(arrays, torch.device("cpu")), arrays, strict=True):
        assert there.shape == here.shape
        assert np.array_equal(there.numpy(), here)


# ---------------------------------------------------------------------- the same answers
@pytest.mark.parametrize("kind", [DeviceRunner, Late])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"prefix": 0}, id="batched"),
        pytest.param({"budget": 64}, id="chunked"),
        pytest.param({}, id="prefix cache on"),
        pytest.param({"num_blocks": 14}, id="preempted"),
        pytest.param({"batch": 2}, id="queued"),
        pytest.param({"batch": 5}, id="an odd batch"),
        pytest.param({"padded": 1}, id="short prompts padded"),
        pytest.param({"padded": 1, "budget": 64, "prefix": 0}, id="chunks padded"),
        pytest.param({"padded": 1, "batch": 1}, id="one at a time, padded"),
    ],
)
def test_answers_are_those_of_the_plain_path(kind, settings, decoder, alone) -> None:  # noqa: ANN001
    core = device_core(decoder, kind, **settings)
    check_equal(alone, run_all(core, REQUESTS), decoder, PROMPTS)
    check_equal(alone, run_all(core, REQUESTS), decoder, PROMPTS)  # over what the first run left behind
    core.scheduler.blocks.check_integrity([])


def test_short_prompts_take_the_smallest_bucket_and_special_ones_none(decoder: Decoder) -> None:
    core = device_core(decoder, padded=1, batch=1, prefix=0)
    graphs = core._executor._runner._steps.of_prompts  # type: ignore[attr-defined]
    lengths = (1, 16, 17, 200, 300)
    for number, length in enumerate(lengths):
        run_all(core, [request(number, [3] * length, max_new_tokens=2)])
    assert graphs._captured.sizes == [(16,), (16,), (32,), (256,), (384,)]
    run_all(core, [request(9, [3] * 5, max_new_tokens=2, repetition_penalty=1.3)])
    assert len(graphs._captured.sizes) == len(lengths)


@pytest.mark.parametrize("kv_dtype", ["int8", "k8v4", "int4"])
def test_padding_changes_nothing_in_a_quantized_cache(kv_dtype: str, decoder: Decoder) -> None:
    plain = run_all(device_core(decoder, kv_dtype=kv_dtype, budget=64), REQUESTS)
    core = device_core(decoder, kv_dtype=kv_dtype, budget=64, padded=1)
    check_equal(plain, run_all(core, REQUESTS), decoder, PROMPTS, kv_dtype)
    assert len(core._executor._runner._steps.of_both._captured.sizes) > 5  # type: ignore[attr-defined]


def test_decodes_beside_short_prompts_are_padded_in_both_numbers(decoder: Decoder) -> None:
    core = device_core(decoder, padded=1, batch=20, prefix=0)
    graphs = core._executor._runner._steps.of_both  # type: ignore[attr-defined]
    prompts = {i: [3 + i] * length for i, length in enumerate((5, 40, 100, 300))}
    requests = [request(i, prompt, max_new_tokens=12) for i, prompt in prompts.items()]
    answers: dict[int, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:  # each begins while those before it go on
        core.add(one)
        collect(core.step(), answers)
    while core.has_work:
        collect(core.step(), answers)
    assert graphs._captured.sizes == [(16, 64), (16, 128), (16, 512)]
    check_equal(
        {r.request_id: run_all(tiny_core(decoder), [r])[r.request_id] for r in requests}, answers, decoder, prompts
    )


@pytest.mark.parametrize("requests", [SAMPLED, SPECIAL, SAMPLED + [replace(r, request_id=9) for r in SPECIAL[1:2]]])
def test_sampling_is_that_of_the_plain_path_whatever_shares_the_batch(requests: list[Request], decoder) -> None:  # noqa: ANN001
    together = run_all(device_core(decoder), requests)
    for one in requests:
        assert together[one.request_id] == run_all(tiny_core(decoder), [one])[one.request_id]
        assert together[one.request_id] == run_all(device_core(decoder), [one])[one.request_id]


def logprobs_of(core: EngineCore, one: Request) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    core.add(one)
    found = []
    while core.has_work:
        for output in core.step():
            assert output.logprob is not None
            found.append((output.logprob.token_id, output.logprob.logprob, output.logprob.top))
    return found


def test_logprobs_are_those_of_the_plain_path(decoder: Decoder) -> None:
    ours, theirs = (logprobs_of(core, SPECIAL[0]) for core in (device_core(decoder), tiny_core(decoder)))
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], abs=1e-4)
    assert [[i for i, _ in row[2]] for row in ours] == [[i for i, _ in row[2]] for row in theirs]


def test_an_abort_while_steps_are_on_the_way(decoder: Decoder, alone: dict[int, list[int]]) -> None:
    core = device_core(decoder, Late)
    for one in REQUESTS:
        core.add(one)
    answers: dict[int, list[int]] = {one.request_id: [] for one in REQUESTS}
    for _ in range(9):
        collect(core.step(), answers)
    for i in (0, 2, 4):
        core.abort(i)
    core.add(replace(REQUESTS[0], request_id=6))  # takes a slot that launched steps still use
    answers[6] = []
    while core.has_work:
        collect(core.step(), answers)
    for i in (1, 3, 5):
        assert answers[i] == alone[i]
    assert answers[6] == alone[0]
    assert all(answers[i] == alone[i][: len(answers[i])] for i in (0, 2, 4))
    core.scheduler.blocks.check_integrity([])


def test_a_launch_that_fails_leaves_nothing_behind(decoder, alone, monkeypatch) -> None:  # noqa: ANN001
    core = device_core(decoder)
    forward = Decoder.forward
    calls = 0

    def breaks(self: Decoder, *args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("out of luck")
        return forward(self, *args)

    monkeypatch.setattr(Decoder, "forward", breaks)
    for one in REQUESTS[:3]:
        core.add(one)
    ended = []
    while core.has_work:
        ended += [o for o in core.step() if o.finish_reason is not None]
    assert [type(o.error) for o in ended] == [EngineError] * 3
    core.scheduler.blocks.check_integrity([])
    assert run_all(core, REQUESTS) == alone


def overflows(core: EngineCore, requests: Sequence[Request]) -> None:
    for one in requests:
        core.add(one)
    outputs = []
    while core.has_work:
        outputs += core.step()
    assert [o.token_id for o in outputs] == [None] * len(requests)
    assert all("not numbers" in str(o.error) for o in outputs)
    core.scheduler.blocks.check_integrity([])


def test_a_model_that_overflows_ends_its_requests_with_an_error(alone: dict[int, list[int]]) -> None:
    decoder = tiny_decoder()
    core = device_core(decoder, Late)
    kept = decoder.final_norm.clone()
    decoder.final_norm.fill_(torch.nan)
    overflows(core, REQUESTS)
    overflows(core, SPECIAL[4:])
    decoder.final_norm.copy_(kept)
    check_equal(alone, run_all(core, REQUESTS), decoder, PROMPTS)


def test_warming_up_leaves_no_trace(decoder: Decoder, alone: dict[int, list[int]]) -> None:
    core = device_core(decoder)
    runner = core._executor._runner  # type: ignore[attr-defined]
    runner.warm_up(max_batched_tokens=512, cuda_graphs=True)
    check_equal(alone, run_all(core, REQUESTS), decoder, PROMPTS)
