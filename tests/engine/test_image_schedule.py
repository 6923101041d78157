"""Pictures among the tokens of prompts: shared, chunked, encoded under a budget of tiles. No model in sight."""

from collections.abc import Sequence
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtool.config import GenerationConfig
from lmtool.engine.batch import Batch, StepOutput
from lmtool.engine.core import EngineCore
from lmtool.engine.requests import place_images
from lmtool.engine.sequence import Request
from lmtool.errors import RequestError
from lmtool.images.prepared import IMAGE_ID, PreparedImage
from tests.engine.fakes import MemoryExecutor, expected_answer
from tests.engine.test_scheduler import SESSION_LEN, check, make_core
from tests.support import collect, run_all


def picture(number: int, num_tokens: int = 5, num_tiles: int = 1) -> PreparedImage:
    digest = blake2b(repr((number, num_tokens, num_tiles)).encode(), digest_size=16).digest()
    return PreparedImage(
        pixels=b"", num_tiles=num_tiles, tile_size=1, size=(1, 1), num_tokens=num_tokens, digest=digest
    )


def with_pictures(request_id: int, prompt: Sequence[int | PreparedImage], count: int) -> Request:
    images = [one for one in prompt if isinstance(one, PreparedImage)]
    ids, placed = place_images([IMAGE_ID if isinstance(one, PreparedImage) else one for one in prompt], images)
    params = GenerationConfig(temperature=0.0, ignore_eos=True, max_new_tokens=count)
    return Request(
        request_id=request_id, prompt_ids=tuple(ids), params=params, stop_ids=frozenset(), seed=0, images=placed
    )


class SeeingExecutor(MemoryExecutor):
    """Checks that a chunk brings exactly the rows that its ids below 0 stand for, and counts what must be encoded."""

    def run(self, batch: Batch) -> StepOutput:
        kept = getattr(self, "kept", set())
        new, left = {}, set()
        for chunk in batch.chunks:
            ids = list(chunk.token_ids)
            for rows in chunk.images:
                told = rows.image.row_ids()[rows.first : rows.first + rows.count]
                assert ids[rows.at : rows.at + rows.count] == told
                ids[rows.at : rows.at + rows.count] = [0] * rows.count
                if rows.image.digest not in kept:
                    new[rows.image.digest] = rows.image.num_tiles
                if rows.first + rows.count < rows.image.num_tokens:
                    left.add(rows.image.digest)
            assert all(i >= 0 for i in ids), "a picture's row came without its picture"
        self.most = max(getattr(self, "most", 0), sum(new.values()))
        self.largest = max(getattr(self, "largest", 0), *new.values(), 0)
        self.kept = left
        return super().run(batch)


def seeing_core(max_image_tiles: int, num_blocks: int = 60, **given: int) -> EngineCore:
    core = make_core(num_blocks, **given)  # type: ignore[arg-type]
    core.scheduler.max_image_tiles = max_image_tiles
    core._executor = SeeingExecutor(num_blocks, 4, given.get("depth", 0))
    return core


pictures = st.builds(picture, st.integers(0, 2), st.integers(1, 9), st.integers(1, 3))
prompts = st.lists(st.integers(0, 1) | pictures, min_size=1, max_size=5)


@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 6), st.integers(0, 10)), min_size=1, max_size=8),
    num_blocks=st.integers(14, 40),
    batch=st.integers(1, 4),
    budget=st.integers(1, 30),
    max_image_tiles=st.integers(1, 6),
    depth=st.integers(0, 1),
    aborts=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 20))),
)
@settings(max_examples=200)
def test_pictures_are_computed_like_text(
    jobs: list[tuple[list[int | PreparedImage], int, int]],
    num_blocks: int,
    batch: int,
    budget: int,
    max_image_tiles: int,
    depth: int,
    aborts: set[tuple[int, int]],
) -> None:
    """Chunks, preemptions, aborts, equal beginnings: every answer is what it would be alone."""
    core = seeing_core(max_image_tiles, num_blocks, batch=batch, budget=budget, depth=depth)
    requests = {
        i: one
        for i, (prompt, count, _) in enumerate(jobs)
        if len((one := with_pictures(i, prompt, count)).prompt_ids) < SESSION_LEN
    }
    late = {i: jobs[i][2] for i in requests}
    answers: dict[int, list[int]] = {i: [] for i in requests}
    cut = set()
    step = 0
    while core.has_work or late:
        for i in [i for i, arrival in late.items() if arrival <= step]:
            core.add(requests[i])
            del late[i]
        cut |= {i for i, when in aborts if when == step and core.abort(i) is not None}
        if core.has_work:
            collect(core.step(), answers)
        check(core)
        step += 1
        assert step < 3000, "the engine does not finish"
    for i, one in requests.items():
        expected = expected_answer(one.prompt_ids, min(jobs[i][1], SESSION_LEN - len(one.prompt_ids)))
        assert answers[i] == (expected[: len(answers[i])] if i in cut else expected)
    assert core.scheduler.blocks.num_free == num_blocks - 1
    executor = core._executor
    if hasattr(executor, "most"):  # the tiles of one step: within the budget, or one picture's own
        assert executor.most <= max(max_image_tiles, executor.largest)  # type: ignore[attr-defined]


def test_the_same_picture_again_computes_only_the_text_after_it() -> None:
    core = seeing_core(4, budget=64)
    cat = picture(0, 10)
    run_all(core, [with_pictures(0, [1, cat, 0, 1], 1)])
    run_all(core, [with_pictures(1, [1, cat, 1, 1, 1], 1)])
    assert core._executor.batches[-1].chunks[0].token_ids == [1, 1, 1]  # type: ignore[attr-defined]
    assert core._executor.batches[-1].chunks[0].images == []  # type: ignore[attr-defined]


def test_two_pictures_with_one_text_share_no_block() -> None:
    core = seeing_core(4, budget=64)
    first, second = (with_pictures(i, [1, 1, 1, 1, picture(i, 8), 0, 0, 0, 0, 1], 2) for i in range(2))
    core.add(first)
    core.add(second)
    core.step()
    tables = [set(sequence.block_table) for sequence in core.scheduler.running]
    assert not tables[0] & tables[1]
    while core.has_work:
        core.step()
    run_all(core, [with_pictures(2, [1, 1, 1, 1, picture(1, 8), 0, 0, 0, 0, 1], 1)])
    assert core.scheduler.counters.num_cached_tokens == 16  # of the second's four full blocks, the picture among them


def test_a_burst_of_pictures_is_encoded_a_few_at_a_time_and_decodes_go_on() -> None:
    core = seeing_core(2, num_blocks=80, batch=8, budget=64)
    core.add(with_pictures(0, [1], 20))
    core.step()
    for i in range(1, 7):
        core.add(with_pictures(i, [picture(i, 4), 1], 2))
    answers: dict[int, list[int]] = {i: [] for i in range(7)}
    while core.has_work:
        collect(core.step(), answers)
    batches = core._executor.batches  # type: ignore[attr-defined]
    encoded = [sum(len(chunk.images) for chunk in one.chunks) for one in batches]
    assert sum(encoded) == 6
    assert max(encoded) == 2
    assert all(one.decodes for one in batches if one.chunks and one.chunks[0].images)


def test_a_picture_larger_than_the_budget_has_a_step_of_its_own() -> None:
    core = seeing_core(2, budget=64)
    answers = run_all(core, [with_pictures(i, [picture(i, 6, num_tiles=5), 1], 1) for i in range(2)])
    assert [len(one.chunks) for one in core._executor.batches] == [1, 1]  # type: ignore[attr-defined]
    assert len(answers[1]) == 1


def test_ids_of_rows_are_a_pictures_own() -> None:
    cat, dog = picture(0, 300), picture(1, 300)
    ids = [*cat.row_ids(), *dog.row_ids()]
    assert len(set(ids)) == 600
    assert all(-(2**63) <= i < 0 for i in ids)
    assert picture(0, 300).row_ids() == cat.row_ids()


def test_pictures_and_places_must_be_as_many() -> None:
    with pytest.raises(RequestError, match="2 pictures, and the chat template has places for 1"):
        place_images([1, IMAGE_ID, 2], [picture(0), picture(1)])
    ids, placed = place_images([1, IMAGE_ID, 2, IMAGE_ID], [picture(0, 3), picture(1, 2)])
    assert [one.start for one in placed] == [1, 5]
    assert [one.end for one in placed] == [4, 7]
    assert [i < 0 for i in ids] == [False, True, True, True, False, True, True]
