"""Scheduling, sharing, preemption and abort over a cache that remembers tokens: no model in sight."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.host_tier import HostTier
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.swap_cost import SwapCost
from lmtool.errors import EngineError
from tests.engine.fakes import LateGrammars, MemoryExecutor, expected_answer, expected_scores
from tests.support import collect, request, run_all

BLOCK_SIZE = 4
SESSION_LEN = 40


def make_core(
    num_blocks: int,
    *,
    batch: int = 4,
    budget: int = 8,
    prefix_caching: bool = True,
    depth: int = 0,
    join_group: int = 1,
    num_host: int = 0,
    lands: Callable[[], bool] = lambda: False,
    load_bytes_per_s: float = float("inf"),
) -> EngineCore:
    blocks = BlockManager(num_blocks, BLOCK_SIZE, prefix_caching=prefix_caching, host=HostTier(num_host, 100))
    scheduler = Scheduler(
        blocks,
        max_batch_size=batch,
        max_batched_tokens=budget,
        join_group=join_group,
        swap_cost=SwapCost(load_bytes_per_s, 100),
    )
    executor = MemoryExecutor(num_blocks, BLOCK_SIZE, depth, num_host, lands)
    return EngineCore(scheduler, executor, session_len=SESSION_LEN)


def check(core: EngineCore) -> None:
    scheduler = core.scheduler
    queued = [s.block_table for s in (*scheduler.running, *scheduler.waiting)]
    scheduler.blocks.check_integrity(queued + scheduler.loads.tables)


# prompts over two letters share beginnings often
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=20)
jobs = st.lists(st.tuples(prompts, st.integers(1, 15), st.integers(0, 12)), min_size=1, max_size=12)
# stops after some token (or never), and bans that can be worked out only when the token before is known
stops = st.lists(st.integers(0, 49), max_size=12)
# the one it comes after: any, itself, one that is not there (yet)
leaders = st.lists(st.none() | st.integers(0, 3) | st.integers(0, 12), max_size=12)
# the bans never come true here (the executor ignores them): they hold a sequence back until its token is read
late_bans = st.sets(st.integers(0, 11))


def expected_until_stop(prompt: list[int], count: int, stop_ids: list[int]) -> list[int]:
    answer = expected_answer(prompt, count)
    ends = [i for i, token_id in enumerate(answer) if token_id in stop_ids]
    return answer[: ends[0] + 1] if ends else answer


@given(
    jobs=jobs,
    num_blocks=st.integers(12, 40),
    batch=st.integers(1, 5),
    budget=st.integers(1, 30),
    aborts=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 6) | st.integers(0, 60))),
    prefix_caching=st.booleans(),
    depth=st.integers(0, 2),
    join_group=st.integers(1, 3),
    stop_ids=stops,
    banned=late_bans,
    num_host=st.sampled_from([0, 0, 3, 10, 40]),
    landing=st.tuples(st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0])),
    broken_copies=st.sets(st.integers(0, 60)),
    load_bytes_per_s=st.sampled_from([0.0, float("inf")]),
    leaders=leaders,
    scored=st.sets(st.integers(0, 11)),
    grammars=st.dictionaries(st.integers(0, 11), st.sampled_from(["whole", "whole", "broken"])),
    broken_steps=st.just(set()) | st.sets(st.integers(0, 14), max_size=3),
)
@settings(max_examples=300)
def test_every_answer_is_what_it_would_be_alone(
    jobs: list[tuple[list[int], int, int]],
    num_blocks: int,
    batch: int,
    budget: int,
    aborts: set[tuple[int, int]],
    prefix_caching: bool,
    depth: int,
    join_group: int,
    stop_ids: list[int],
    banned: set[int],
    num_host: int,
    landing: tuple[int, float],
    broken_copies: set[int],
    load_bytes_per_s: float,
    leaders: list[int | None],
    scored: set[int],
    grammars: dict[int, str],
    broken_steps: set[int],
) -> None:
    """Random arrivals, aborts, stops, budgets and caches too small for all, steps launched before others are read,
    steps that break, requests that come after others, grammars that are late or come to nothing, blocks that leave for
    the host and come back late or not at all: nothing mixes, nothing leaks, nobody is forgotten."""
    random = Random(landing[0])
    core = make_core(
        num_blocks,
        batch=batch,
        budget=budget,
        prefix_caching=prefix_caching,
        depth=depth,
        join_group=join_group,
        num_host=num_host,
        lands=lambda: random.random() < landing[1],
        load_bytes_per_s=load_bytes_per_s,
    )
    late_grammars = LateGrammars(lambda: random.random() < 0.4)
    core._grammars = late_grammars  # type: ignore[assignment]
    answers: dict[int, list[int]] = {i: [] for i in range(len(jobs))}
    cut = set()  # by an abort or a step that broke
    begun: list[int] = []  # who had a token or an end, in that order
    held: dict[int, int] = {}  # who was to wait for whom
    scores = {}
    late = {i: arrival for i, (_, _, arrival) in enumerate(jobs)}
    step = 0
    while core.has_work or late:
        for i in [i for i, arrival in late.items() if arrival <= step]:
            bad_ids = ((7, 8),) if i in banned else ()
            after = leaders[i] if i < len(leaders) else None
            settings = {"max_new_tokens": jobs[i][1], "stop_token_ids": stop_ids, "bad_ids": bad_ids, "after": after}
            if i in grammars:
                settings["response_format"] = {"type": "grammar", "grammar": grammars[i]}
            core.add(request(i, jobs[i][0], prompt_logprobs=0 if i in scored else None, **settings))
            del late[i]
            if after is not None and after != i and after < len(jobs) and after not in late and after not in begun:
                held[i] = after
        for i, when in aborts:
            if when == step and core.abort(i) is not None:
                cut.add(i)
                begun.append(i)
        core._executor.fail_next_copy = step in broken_copies  # type: ignore[attr-defined]
        core._executor.fail_next = step in broken_steps  # type: ignore[attr-defined]
        if core.has_work:
            outputs = core.step()
            scores |= {
                o.request_id: o.prompt_logprobs for o in outputs if o.token_id is not None and o.request_id not in begun
            }
            begun += [output.request_id for output in outputs]
            cut |= {output.request_id for output in outputs if output.error is not None}
            collect([output for output in outputs if output.error is None], answers)
        check(core)
        step += 1
        assert step < 3000, "the engine does not finish"
    for i, (prompt, count, _) in enumerate(jobs):
        expected = expected_until_stop(prompt, count, stop_ids)
        assert answers[i] == (expected[: len(answers[i])] if i in cut else expected)
        if answers[i]:
            assert scores[i] == (expected_scores(prompt) if i in scored else None)
        if grammars.get(i) == "broken" and i not in cut:
            assert len(expected) <= 2
    assert set(begun) == set(range(len(jobs)))
    told = late_grammars.told
    assert sorted(map(id, late_grammars.left)) == sorted(map(id, told))
    assert not core._constrained
    assert all(begun.index(leader) < begun.index(i) or i in cut for i, leader in held.items())
    blocks = core.scheduler.blocks
    assert blocks.num_free == num_blocks - 1
    assert blocks.host.num_pinned == 0


def test_prompts_are_chunked_and_decodes_go_on_meanwhile() -> None:
    core = make_core(30, budget=6)
    core.add(request(0, [1, 0], max_new_tokens=12))
    core.step()
    core.add(request(1, list(range(20)), max_new_tokens=3))
    answers: dict[int, list[int]] = {0: [], 1: []}
    while core.has_work:
        collect(core.step(), answers)
    batches = core._executor.batches  # type: ignore[attr-defined]
    mixed = [b for b in batches if b.decodes and b.chunks]
    assert len(mixed) >= 4
    assert all(b.num_tokens <= 6 for b in batches)
    assert answers[1] == expected_answer(list(range(20)), 3)


def test_an_equal_beginning_is_computed_once() -> None:
    core = make_core(40, budget=64)
    prompt = [1] * 13
    run_all(core, [request(0, prompt, max_new_tokens=1)])
    run_all(core, [request(1, [*prompt, 0, 0], max_new_tokens=2)])
    assert core.scheduler.counters.num_cached_tokens == 13  # 3 full blocks and the tail of a fourth
    last = core._executor.batches[-2].chunks[0]  # type: ignore[attr-defined]
    assert last.token_ids == [0, 0]


def test_the_next_turn_computes_only_what_is_new() -> None:
    core = make_core(40, budget=64)
    prompt = [1, 0, 1, 0, 0, 1, 1]
    answer = run_all(core, [request(0, prompt, max_new_tokens=6)])[0]
    turn = [*prompt, *answer, 1, 1]
    assert run_all(core, [request(1, turn, max_new_tokens=3)])[1] == expected_answer(turn, 3)
    # all but the answer's last token, whose K/V nobody needed, was in the cache
    assert core._executor.batches[-3].chunks[0].token_ids == [answer[-1], 1, 1]  # type: ignore[attr-defined]


def test_when_blocks_run_out_the_youngest_waits_and_loses_nothing() -> None:
    core = make_core(9, budget=64)
    prompts = {i: [i] * 8 for i in range(3)}
    answers = run_all(core, [request(i, p, max_new_tokens=12) for i, p in prompts.items()])
    assert answers == {i: expected_answer(p, 12) for i, p in prompts.items()}
    assert core.scheduler.counters.num_preemptions > 0


def test_a_failed_step_ends_its_requests_and_the_engine_lives_on() -> None:
    core = make_core(30, batch=2, budget=64)
    for i in range(3):
        core.add(request(i, [i, 1], max_new_tokens=4))
    core._executor.fail_next = True  # type: ignore[attr-defined]
    outputs = core.step()
    assert sorted(o.request_id for o in outputs) == [0, 1]
    assert all(isinstance(o.error, EngineError) for o in outputs)
    assert "RuntimeError: the card fell off the bus" in str(outputs[0].error)
    assert "\n" not in str(outputs[0].error)
    check(core)
    answers: dict[int, list[int]] = {2: []}
    while core.has_work:
        collect(core.step(), answers)
    assert answers[2] == expected_answer([2, 1], 4)


def test_how_an_answer_ends() -> None:
    core = make_core(30, budget=64)
    prompt = [1, 0, 1]
    stop = expected_answer(prompt, 5)[2]
    reasons = {}
    core.add(request(0, prompt, max_new_tokens=5, stop_token_ids=(stop,)))
    core.add(request(1, prompt, max_new_tokens=2))
    core.add(request(2, prompt))
    core.add(request(3, prompt, max_new_tokens=5, min_new_tokens=4, stop_token_ids=(stop,)))
    answers: dict[int, list[int]] = {i: [] for i in range(4)}
    while core.has_work:
        outputs = core.step()
        collect(outputs, answers)
        reasons |= {o.request_id: o.finish_reason for o in outputs if o.finish_reason}
    first = expected_answer(prompt, 5).index(stop) + 1
    assert reasons == {0: "stop", 1: "length", 2: "context", 3: "length"}
    assert [len(answers[i]) for i in range(4)] == [first, 2, SESSION_LEN - len(prompt), 5]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("bad", [((7,),), ((3, 7), (9,))])
def test_bad_sequences_are_banned_where_they_would_be_completed(bad: tuple[tuple[int, ...], ...], depth: int) -> None:
    core = make_core(30, budget=64, depth=depth)
    core.add(request(0, [1, 2], max_new_tokens=6, bad_ids=bad))
    while core.has_work:
        core.step()
    answer = expected_answer([1, 2], 6)
    for i, batch in enumerate(core._executor.batches):  # type: ignore[attr-defined]
        wanted = [b[-1] for b in bad if len(b) == 1 or (i > 0 and (answer[i - 1],) == b[:-1])]
        assert [token for _, token in batch.bans] == wanted


# ---------------------------------------------------------------------- launched before others are read
def test_the_next_step_is_launched_before_the_last_one_is_read() -> None:
    core = make_core(30, budget=64, depth=1)
    core.add(request(0, [1, 0], max_new_tokens=4))
    assert core.step() == []
    launched = core._executor.batches  # type: ignore[attr-defined]
    for number in range(4):
        outputs = core.step()
        assert len(outputs) == 1
        assert len(launched) == min(number + 2, 4)  # the fourth token is known to be the last: nothing is wasted
    assert not core.has_work


def test_what_was_launched_for_a_sequence_that_had_stopped_is_dropped() -> None:
    answer = expected_answer([1, 0], 4)
    core = make_core(30, batch=1, budget=64, depth=1)
    core.add(request(0, [1, 0], max_new_tokens=9, stop_token_ids=(answer[1],)))
    core.add(request(1, [0, 0], max_new_tokens=3))
    answers: dict[int, list[int]] = {0: [], 1: []}
    while core.has_work:
        collect(core.step(), answers)
        check(core)
    assert answers == {0: answer[: answer.index(answer[1]) + 1], 1: expected_answer([0, 0], 3)}


def test_a_step_that_breaks_when_it_is_read_ends_its_requests_and_no_others() -> None:
    core = make_core(30, batch=2, budget=64, depth=1)
    for i in range(3):
        core.add(request(i, [i, 1], max_new_tokens=4))
    assert core.step() == []
    core._executor.fail_next = True  # type: ignore[attr-defined]
    outputs = core.step()
    assert sorted(o.request_id for o in outputs) == [0, 1]
    assert all(isinstance(o.error, EngineError) for o in outputs)
    check(core)
    answers: dict[int, list[int]] = {2: []}
    while core.has_work:
        collect(core.step(), answers)
    assert answers[2] == expected_answer([2, 1], 4)


def test_while_others_wait_for_slots_sequences_start_in_groups() -> None:
    core = make_core(60, batch=4, budget=64, depth=1, join_group=2)
    jobs = {i: ([i], 3 + i) for i in range(9)}
    answers = run_all(core, [request(i, p, max_new_tokens=n) for i, (p, n) in jobs.items()])
    assert answers == {i: expected_answer(p, n) for i, (p, n) in jobs.items()}
    joins = [len(b.joins) for b in core._executor.batches if b.joins]  # type: ignore[attr-defined]
    assert joins == [4, 2, 2, 1]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preempted_while_its_tokens_are_on_the_way(depth: int) -> None:
    """They are read first; then it starts again with them."""
    on_the_way = 0
    for seed in range(60):
        random = Random(seed)
        core = make_core(12, batch=5, budget=64, depth=depth)
        jobs = {i: ([i, 1] * random.randint(1, 4), random.randint(1, 20)) for i in range(8)}
        for i, (prompt, count) in jobs.items():
            core.add(request(i, prompt, max_new_tokens=count))
        answers: dict[int, list[int]] = {i: [] for i in jobs}
        while core.has_work:
            collect(core.step(), answers)
            check(core)
            on_the_way += sum(s.num_inflight_tokens for s in core.scheduler.waiting)
        assert answers == {i: expected_answer(*job) for i, job in jobs.items()}
    assert depth == 1 or on_the_way > 0  # with a depth of one they are read in the same step


# ---------------------------------------------------------------------- one after another
@pytest.mark.parametrize("depth", [0, 1])
def test_the_choices_of_one_prompt_compute_it_once(depth: int) -> None:
    """A prompt of three full blocks and a rest: the blocks are computed and held once, the rest by each."""
    core = make_core(40, batch=4, budget=64, depth=depth)
    prompt = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1]
    choices = [request(i, prompt, max_new_tokens=6, after=None if i == 0 else 0) for i in range(4)]
    for one in choices:
        core.add(one)
    most, answers = 0, {i: list[int]() for i in range(4)}
    while core.has_work:
        collect(core.step(), answers)
        most = max(most, 39 - core.scheduler.blocks.num_free)
        check(core)
    assert answers == dict.fromkeys(range(4), expected_answer(prompt, 6))
    assert core.scheduler.counters.num_prompt_tokens - core.scheduler.counters.num_cached_tokens == 14 + 3 * 2
    assert most == 3 + 4 * 2  # each has a rest and an answer of its own: 8 tokens of which one is never computed


def test_who_comes_after_starts_before_those_who_came_later() -> None:
    core = make_core(40, batch=1, budget=64)
    for i, after in enumerate((None, 0, 0, None)):
        core.add(request(i, [1, i], max_new_tokens=3, after=after))
    order = []
    while core.has_work:
        order += [o.request_id for o in core.step() if o.finish_reason]
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["aborted", "broken"])
def test_whatever_becomes_of_the_first_the_others_start(how: str) -> None:
    core = make_core(40, batch=1, budget=64)
    for i, after in enumerate((None, 0, 0, 1)):
        core.add(request(i, [1, 0, i], max_new_tokens=2, after=after))
    if how == "aborted":
        core.abort(2)  # one that waits: nobody else notices
        core.abort(0)
    else:
        core._executor.fail_next = True  # type: ignore[attr-defined]
        assert [o.finish_reason for o in core.step()] == ["error"]
    answers: dict[int, list[int]] = {i: [] for i in range(4)}
    while core.has_work:
        collect(core.step(), answers)
    check(core)
    ended = {0, 2} if how == "aborted" else {0}
    assert answers == {i: [] if i in ended else expected_answer([1, 0, i], 2) for i in range(4)}


def test_after_one_that_is_not_there_or_has_begun_means_at_once() -> None:
    core = make_core(40, batch=4, budget=64)
    core.add(request(0, [1], max_new_tokens=9))
    core.step()
    for i, after in enumerate((0, 77, -5, 4), 1):
        core.add(request(i, [1, i], max_new_tokens=1, after=after))
    assert {o.request_id for o in core.step() + core.step()} == {0, 1, 2, 3, 4}
