"""The search for launch configurations: on a card whose times are a known function; and what may be tried at all."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from lmtool.bench import candidates, tune
from lmtool.bench.candidates import Card, shared_bytes
from lmtool.bench.checks import TOLERANCE, relative_error
from lmtool.bench.decode_step import DecodeStep
from lmtool.bench.shapes import SHAPES, Product, all_products, products
from lmtool.bench.tune import Timed
from lmtool.errors import KernelError
from lmtool.kernels.triton import tables, tuning
from lmtool.kernels.triton.tuning import LibraryConfig, RowConfig, TileConfig
from tests.support import TINY

H200 = Card(num_processors=132, shared_bytes=232448, read_bytes_per_us=4.4e6)
DOWN = Product("down", "add_linear_", 4096, 14336)
GATE_UP = Product("gate_up", "norm_linear_silu", 14336, 4096)
# neither is what a candidate list begins with
SLOW = Timed(99, 999)
BEST_TILE, BEST_ROW = TileConfig(64, 128, 4, 4, swap=False, split=6), RowConfig(2, 1024, 2)


class FakeTrials:
    """A card on which a configuration is the slower the further it is from the best; one does not compile."""

    def __init__(self, *, library_us: float = 50.0, broken: Any = None, all_wrong: bool = False) -> None:
        self.library_us, self.broken, self.all_wrong = library_us, broken, all_wrong
        self.compiled: list[tuple[int, Any]] = []

    def current(self, product: Product, rows: int) -> Any:
        return RowConfig(1, 2048, 2) if rows == 1 else TileConfig(128, 64, 4, 3)

    def compile(self, product: Product, rows: int, config: Any) -> "Future[str | None]":
        self.compiled.append((rows, config))
        done: Future[str | None] = Future()
        done.set_result("PassManager failed" if config == self.broken else None)
        return done

    def quick_us(self, product: Product, rows: int, config: Any) -> float | str:
        return "its result differs from the reference by 0.5" if self.all_wrong else self._us(rows, config)

    def careful_us(self, product: Product, rows: int, configs: Sequence[Any]) -> list[Timed]:
        times = [self.library_us if config is None else self._us(rows, config) for config in configs]
        return [Timed(us, 10 * us) for us in times]

    def _us(self, rows: int, config: Any) -> float:
        best = BEST_ROW if rows == 1 else BEST_TILE
        return 20.0 + rows + sum(abs(a - b) / max(a, b, 1) for a, b in zip(config, best, strict=True))


def test_the_search_reaches_the_best_through_its_neighbours() -> None:
    trials = FakeTrials()
    found = {one.rows: one for one in tune.tune([DOWN], [1, 16, 32, 64], trials, H200)}
    assert set(found) == {1, 16, 32, 64}
    assert found[1].config == BEST_ROW
    assert found[16].config[:2] == BEST_TILE[:2]
    assert found[16].time < found[16].before_time
    for one in found.values():
        assert one.time <= one.before_time, "what was used before is among the finalists"
        assert one.library_time.us == 50.0
    tried = [config for rows, config in trials.compiled if rows == 16]
    assert BEST_TILE not in candidates.tile_candidates(DOWN, 16, H200)
    assert len(tried) == len(set(tried)), "nothing is compiled twice"
    count, seconds = tune.estimate([DOWN], [1, 16, 32, 64], 15)
    assert len(trials.compiled) <= count
    assert 15 < seconds < 60


def test_what_does_not_compile_is_told_and_left_out() -> None:
    broken = candidates.tile_candidates(DOWN, 16, H200)[0]
    [found] = tune.tune([DOWN], [16], FakeTrials(broken=broken), H200)
    assert found.failures == [f"{broken}: PassManager failed"]
    assert found.config != broken


def test_wrong_results_end_the_search() -> None:
    with pytest.raises(KernelError, match=r"down 4096×14336, 16 rows: no configuration .* differs from the reference"):
        list(tune.tune([DOWN], [16], FakeTrials(all_wrong=True), H200))


@pytest.mark.parametrize(("library_us", "above"), [(60.0, 64), (51.9, 64), (51.8, 32), (30.0, 16), (27.0, 1)])
def test_where_the_library_takes_over_comes_from_the_times(library_us: float, above: int) -> None:
    """A step takes 28, 36 and 52 µs with the kernel, which stays unless the library is clearly faster.

    Alone the library would always be the faster one.
    """
    measured = [
        tune.Tuned(DOWN, rows, BEST_TILE, SLOW, BEST_TILE, Timed(9, 20 + rows / 2), Timed(8, library_us), 1, [])
        for rows in (16, 32, 64)
    ]
    table = tables.Table(tune.entries(measured, lambda product: 32))
    assert table.find(tune.key("library", DOWN)) == LibraryConfig(above)


def test_the_library_stays_where_it_was_beyond_what_was_measured() -> None:
    fast = tune.Tuned(DOWN, 16, BEST_TILE, SLOW, BEST_TILE, Timed(8, 80), Timed(10, 90), 1, [])
    table = tables.Table(tune.entries([fast], lambda product: 32))
    assert table.find(tune.key("library", DOWN)) == LibraryConfig(32)
    assert table.find(tune.key("tiles", DOWN), 16) == BEST_TILE
    assert table.find(tune.key("tiles", DOWN), 17) is None
    assert tables.Table(tune.entries([], lambda product: 32)).find(tune.key("rows", DOWN)) is None


# ---------------------------------------------------------------------- candidates
@pytest.mark.parametrize("product", all_products(SHAPES.values()), ids=str)
def test_every_candidate_fits_a_card(product: Product) -> None:
    small = Card(num_processors=40, shared_bytes=64 << 10, read_bytes_per_us=3e5)
    for card in (H200, small):
        for rows in candidates.BUCKETS[1:]:
            found = candidates.tile_candidates(product, rows, card)
            assert all(shared_bytes(config, product, rows) <= card.shared_bytes for config in found)
            assert len(found) == len(set(found)) <= candidates.COUNT
        assert len(candidates.tile_candidates(product, 16, card)) >= 4
        near = candidates.neighbours(candidates.tile_candidates(product, 16, card)[:2], product, 16, card)
        assert all(shared_bytes(config, product, 16) <= card.shared_bytes for config in near)
    rows = candidates.row_candidates(product)
    assert 8 <= len(rows) <= candidates.COUNT
    assert all(config.block_k < 2 * max(product.num_in, 256) for config in rows)


def test_a_configuration_for_more_rows_gives_up_stages() -> None:
    deep = TileConfig(128, 128, 4, 6, split=3)
    assert candidates.fitting([deep], DOWN, 16, H200) == [deep]
    assert candidates.fitting([deep], DOWN, 64, H200) == [deep._replace(num_stages=4)]
    assert candidates.fitting([TileConfig(128, 256, 4, 3)], GATE_UP, 64, H200) == []


def test_buckets() -> None:
    assert [candidates.bucket(rows) for rows in (1, 2, 16, 17, 33, 64)] == [1, 16, 16, 32, 64, 64]


def test_the_matrices_of_a_shape_are_those_of_its_parameters() -> None:
    model = SHAPES["llama3-8b"]
    of_layers = sum(one.num_weights for one in products(model) if one.name != "head")
    norms = (2 * model.num_layers + 1) * model.hidden_size
    embeddings = 2 * model.vocab_size * model.hidden_size
    assert model.num_layers * of_layers + norms + embeddings == model.num_parameters
    shared = all_products([SHAPES["llama3-8b"], SHAPES["llama2-7b"]])
    assert len(shared) == 9, "o has the same size in both"


# ---------------------------------------------------------------------- checks
def test_an_error_is_relative_and_nan_never_passes() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected.half(), expected) == 0
    assert not relative_error(torch.tensor([float("nan"), 4.0]), expected) <= TOLERANCE[torch.float16]


def test_a_step_is_one_of_the_model() -> None:
    """On a CPU, where it is no graph: new ids of the vocabulary for every sequence."""
    model = replace(TINY, num_kv_heads=1)
    step = DecodeStep(model, 3, torch.float32, torch.device("cpu"))
    before = step._ids.clone()
    step._step()
    assert step._ids.shape == (3,)
    assert not torch.equal(step._ids, before)
    assert 0 <= int(step._ids.min()) <= int(step._ids.max()) < model.vocab_size


@pytest.mark.gpu
def test_a_card_tries_a_configuration() -> None:
    from lmtool.bench.trials import CardTrials

    model = SHAPES["internlm2-1_8b"]
    product = products(model)[1]
    trials = CardTrials([model], torch.float16, torch.device("cuda"))
    try:
        config = trials.current(product, 16)
        assert trials.compile(product, 16, config).result() is None
        assert 1 < trials.quick_us(product, 16, config) < 1000
        too_large = tuning.TileConfig(128, 256, 4, 6)
        assert "shared memory" in str(trials.quick_us(product, 16, too_large))
        for timed in trials.careful_us(product, 16, [config, None]):
            assert 1 < timed.us < timed.step_us < 10_000
    finally:
        trials.close()
