"""Beginnings that left the device come back from the host, while others run: scheduling over a cache that remembers
tokens, then the real engine on a tiny model."""

from functools import partial
from random import Random

import pytest

from lmtool.engine.core import EngineCore
from lmtool.engine.swap_cost import SwapCost
from tests.engine.fakes import expected_answer
from tests.engine.test_scheduler import BLOCK_SIZE, check, make_core
from tests.support import collect, request, run_all

FIRST = [0] * 17
OTHER = [1] * 25


def chunks(core: EngineCore) -> list[tuple[int, int]]:
    """(start, tokens) of every prompt chunk that was computed."""
    batches = core._executor.batches  # type: ignore[attr-defined]
    return [(chunk.start, len(chunk.token_ids)) for batch in batches for chunk in batch.chunks]


def pushed_out(**settings: object) -> EngineCore:
    """FIRST was answered, then OTHER took the whole cache: FIRST's full blocks are on the host."""
    core = make_core(10, **{"budget": 64, "num_host": 16, **settings})  # type: ignore[arg-type]
    run_all(core, [request(0, FIRST, max_new_tokens=1)])
    run_all(core, [request(1, OTHER, max_new_tokens=12)])
    assert core.scheduler.counters.host_saved_bytes == 400
    core._executor.batches.clear()  # type: ignore[attr-defined]
    return core


@pytest.mark.parametrize("depth", [0, 1])
def test_a_returning_turn_computes_only_what_is_new(depth: int) -> None:
    core = pushed_out(depth=depth)
    turn = [*FIRST, *expected_answer(FIRST, 1), 1, 1]
    assert run_all(core, [request(2, turn, max_new_tokens=3)])[2] == expected_answer(turn, 3)
    assert chunks(core) == [(16, 4)]
    counters = core.scheduler.counters
    assert counters.num_host_hit_tokens == counters.num_host_hit_blocks * BLOCK_SIZE > 0
    assert counters.host_loaded_bytes == counters.num_host_hit_blocks * 100
    check(core)


def test_others_run_while_blocks_are_on_their_way() -> None:
    core = pushed_out(depth=1)
    core.add(request(2, [1, 0, 1], max_new_tokens=9))
    core.step()
    core.add(request(3, FIRST, max_new_tokens=2))
    core.add(request(4, [0, 1, 1], max_new_tokens=2))
    answers: dict[int, list[int]] = {i: [] for i in (2, 3, 4)}
    for _ in range(6):
        collect(core.step(), answers)
        check(core)
    assert core.scheduler.loads.num_sequences == 1
    assert [len(answers[i]) for i in (2, 3, 4)] == [6, 0, 2]  # the one behind it has overtaken it
    core._executor.lands = lambda: True  # type: ignore[attr-defined]
    while core.has_work:
        collect(core.step(), answers)
    assert answers[3] == expected_answer(FIRST, 2)


def test_two_with_one_beginning_wait_for_one_copy() -> None:
    core = pushed_out(depth=1)
    answers = run_all(core, [request(i, [*FIRST, i], max_new_tokens=2) for i in (2, 3)])
    assert answers == {i: expected_answer([*FIRST, i], 2) for i in (2, 3)}
    assert core.scheduler.counters.host_loaded_bytes == 400
    assert sorted(chunks(core)) == [(16, 2), (16, 2)]


def test_aborted_while_its_blocks_are_on_their_way() -> None:
    """They land all the same, and the next one finds them."""
    core = pushed_out(depth=1)
    core.add(request(2, FIRST, max_new_tokens=2))
    core.add(request(3, [1, 0, 1], max_new_tokens=4))
    core.step()
    assert core.scheduler.loads.num_sequences == 1
    assert core.abort(2) is not None
    check(core)
    assert core.scheduler.loads.num_sequences == 0
    assert core.scheduler.blocks.host.num_pinned == 4
    answers: dict[int, list[int]] = {3: []}
    while core.has_work:
        collect(core.step(), answers)
        check(core)
    assert answers[3] == expected_answer([1, 0, 1], 4)
    assert core.scheduler.blocks.num_free == 9
    loaded = core.scheduler.counters.host_loaded_bytes
    run_all(core, [request(4, FIRST, max_new_tokens=2)])
    assert core.scheduler.counters.host_loaded_bytes == loaded


def test_what_is_computed_sooner_than_copied_is_computed() -> None:
    core = pushed_out(load_bytes_per_s=1e-6)
    answers = run_all(core, [request(2, FIRST, max_new_tokens=2)])
    assert answers[2] == expected_answer(FIRST, 2)
    assert chunks(core)[0] == (0, 17)
    assert core.scheduler.counters.num_host_hit_blocks == 0


def test_copies_that_fail_cost_time_and_nothing_else() -> None:
    core = pushed_out(depth=1)
    core._executor.fail_next_copy = True  # type: ignore[attr-defined]
    answers = run_all(core, [request(i, [*FIRST, i], max_new_tokens=2) for i in (2, 3)])
    assert answers == {i: expected_answer([*FIRST, i], 2) for i in (2, 3)}
    check(core)


def test_blocks_that_were_loaded_are_given_back_when_they_are_needed() -> None:
    """The one that was preempted stands before the one that was loaded, which holds what it needs."""
    seen = 0
    for seed in range(40):
        random = Random(seed)
        core = make_core(13, budget=64, num_host=60, depth=1, lands=partial(random.choice, (True, False)))
        jobs = {i: ([i % 3] * random.randint(4, 20), random.randint(4, 18)) for i in range(14)}
        for i, (prompt, count) in jobs.items():
            core.add(request(i, prompt, max_new_tokens=count))
        answers: dict[int, list[int]] = {i: [] for i in jobs}
        while core.has_work:
            collect(core.step(), answers)
            check(core)
            seen += sum(bool(s.block_table) for s in core.scheduler.waiting)
        assert answers == {i: expected_answer(*job) for i, job in jobs.items()}
    assert seen > 0


def test_a_preempted_sequence_comes_back_by_copying() -> None:
    core = make_core(11, budget=64, num_host=60)
    prompts = {i: [i] * 8 for i in range(3)}
    answers = run_all(core, [request(i, p, max_new_tokens=20) for i, p in prompts.items()])
    assert answers == {i: expected_answer(p, 20) for i, p in prompts.items()}
    assert core.scheduler.counters.num_preemptions > 0
    assert core.scheduler.counters.num_host_hit_blocks > 0


def test_the_cheaper_way_is_measured() -> None:
    cost = SwapCost(load_bytes_per_s=1000.0, block_bytes=100)  # ten blocks a second
    assert cost.prefers_load(1000, 1)  # nothing is known of the other way
    cost.step_took(100, 1.0)
    assert cost.prefers_load(10, 101)
    assert not cost.prefers_load(10, 99)
    for _ in range(200):
        cost.step_took(1000, 1.0)  # a faster kernel, or a shorter prompt: the newest steps count most
    assert cost.prefill_tokens_per_s == pytest.approx(1000, rel=0.1)
    assert not cost.prefers_load(10, 900)


def test_a_save_that_fails_is_not_found_later() -> None:
    core = make_core(10, budget=64, num_host=16, depth=1)
    run_all(core, [request(0, FIRST, max_new_tokens=1)])
    core._executor.fail_next_copy = True  # type: ignore[attr-defined]
    run_all(core, [request(1, OTHER, max_new_tokens=12)])
    assert len(core.scheduler.blocks.host) < 4
    core._executor.batches.clear()  # type: ignore[attr-defined]
    assert run_all(core, [request(2, FIRST, max_new_tokens=2)])[2] == expected_answer(FIRST, 2)
    assert chunks(core)[0][0] < 16


@pytest.mark.parametrize("depth", [0, 1])
def test_many_that_return_at_once_are_each_loaded_once(depth: int) -> None:
    """Loading does not take the room that those before need to start and to go on."""
    core = make_core(18, budget=64, num_host=200, depth=depth, batch=8)
    prompts = {i: [i % 2, i // 2 % 2, i // 4 % 2, i // 8] * 5 for i in range(12)}
    answers = run_all(core, [request(i, prompt, max_new_tokens=4) for i, prompt in prompts.items()])
    turns = {100 + i: [*prompt, *answers[i], 9] for i, prompt in prompts.items()}
    counters = core.scheduler.counters
    hits, cached = counters.num_host_hit_tokens, counters.num_cached_tokens
    answers = run_all(core, [request(i, turn, max_new_tokens=6) for i, turn in turns.items()])
    assert answers == {i: expected_answer(turn, 6) for i, turn in turns.items()}
    assert 8 * 20 < counters.num_host_hit_tokens - hits <= counters.num_cached_tokens - cached


def test_a_preempted_sequence_computes_only_what_its_full_blocks_do_not_hold() -> None:
    core = make_core(6, budget=64)
    core.add(request(0, [0] * 6, max_new_tokens=12))
    core.add(request(1, [1] * 7, max_new_tokens=12))
    answers: dict[int, list[int]] = {0: [], 1: []}
    while not core.scheduler.counters.num_preemptions:
        collect(core.step(), answers)
    core.abort(0)
    core._executor.batches.clear()  # type: ignore[attr-defined]
    while core.has_work:
        collect(core.step(), answers)
    assert answers[1] == expected_answer([1] * 7, 12)
    assert chunks(core)[0] == (8, 2)  # its open block is the one that was needed
