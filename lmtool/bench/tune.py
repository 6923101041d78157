"""The search behind a tuning table: which launch configuration of a product kernel is the fastest on a card.

Two rounds: likely candidates (`candidates`) for one row and for the smallest bucket of several; then the neighbours of
the best, and the best in larger buckets. What is right and how long it takes is asked of `Trials`; no device here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lmtool.bench import candidates
from lmtool.bench.candidates import Card
from lmtool.bench.shapes import Product
from lmtool.errors import KernelError
from lmtool.kernels.triton import tables, tuning

_COMPILE_S, _TIME_S, _START_S = 1.2, 0.02, 15.0  # of one candidate, roughly, and of the processes: for the plan
_NUM_FINALISTS = 4
_REFINED = 10  # of the first bucket's best, tried in a larger one
_NUM_CENTRES, _NUM_NEIGHBOURS = 4, 28  # so many of the best have about so many neighbours
_LEAST_GAIN = 0.002  # of a whole step: a smaller one is noise, and nothing is changed for it

Config = Any  # RowConfig or TileConfig


class Timed(NamedTuple):
    """µs: alone, among its like; and of a decode step in which it is used for its matrix."""

    us: float
    step_us: float


class Trials(Protocol):
    """A card on which configurations are tried. None in place of a configuration is the library's product."""

    def current(self, product: Product, rows: int) -> Config:
        """What is used until now: an entry of a table, or the rule."""

    def compile(self, product: Product, rows: int, config: Config) -> "Future[str | None]":
        """Begin to; → what is wrong with it."""

    def quick_us(self, product: Product, rows: int, config: Config) -> float | str:
        """The time of one that is compiled; a text: why it has none (it does not fit, or its result is wrong)."""

    def careful_us(self, product: Product, rows: int, configs: Sequence[Config | None]) -> list[Timed]:
        """The times of several that run, taken in turn."""


@dataclass(slots=True)
class Tuned:
    """What came out for a matrix and a bucket of rows. before: what was used until now."""

    product: Product
    rows: int
    before: Config
    before_time: Timed
    config: Config
    time: Timed
    library_time: Timed
    num_tried: int
    failures: list[str]


@dataclass(slots=True)
class _Search:
    """A matrix and a bucket: what was tried, and what it took."""

    product: Product
    rows: int
    pending: list[tuple[Config, "Future[str | None]"]] = field(default_factory=list)
    times_us: dict[Config, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def best(self) -> list[Config]:
        return sorted(self.times_us, key=lambda config: self.times_us[config])

    def submit(self, configs: Iterable[Config], trials: Trials) -> None:
        for config in dict.fromkeys(configs):
            if config not in self.times_us:
                self.pending.append((config, trials.compile(self.product, self.rows, config)))

    def time(self, trials: Trials) -> None:
        for config, compiled in self.pending:
            found = compiled.result() or trials.quick_us(self.product, self.rows, config)
            if isinstance(found, str):
                self.failures.append(f"{config}: {found}")
            else:
                self.times_us[config] = found
        self.pending.clear()


def estimate(wanted: Sequence[Product], buckets: Sequence[int], num_workers: int) -> tuple[int, float]:
    """How many candidates, and how many seconds they take: both roughly."""
    first = _first(buckets)
    of_bucket = {1: candidates.COUNT + 1, first: candidates.COUNT + 1 + _NUM_NEIGHBOURS}
    count = len(wanted) * sum(of_bucket.get(bucket, _REFINED + 1) for bucket in buckets)
    return count, _START_S + count * max(_COMPILE_S / num_workers, _TIME_S)


def tune(
    wanted: Sequence[Product],
    buckets: Sequence[int],
    trials: Trials,
    card: Card,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Tuned]:
    """The best configuration of each matrix and bucket, as soon as it is known.

    Raises KernelError where no configuration gives what the reference gives.
    """
    first = _first(buckets)
    searches = [_Search(product, bucket) for product in wanted for bucket in buckets if bucket in (1, first)]
    for search in searches:
        search.submit([trials.current(search.product, search.rows), *_likely(search, card)], trials)
    second: list[_Search] = []
    for i, search in enumerate(searches):
        progress(f"first round, {i + 1} of {len(searches)}: {search.product}, {search.rows} rows")
        search.time(trials)
        second.append(search)
        if search.rows > 1:
            search.submit(candidates.neighbours(search.best[:_NUM_CENTRES], search.product, search.rows, card), trials)
            second += [_larger(search, bucket, trials, card) for bucket in buckets if bucket > first]
    for i, search in enumerate(second):
        progress(f"second round, {i + 1} of {len(second)}: {search.product}, {search.rows} rows")
        search.time(trials)
        yield _decide(search, trials)


def _first(buckets: Sequence[int]) -> int:
    return min((bucket for bucket in buckets if bucket > 1), default=1)


def _likely(search: _Search, card: Card) -> Sequence[Config]:
    if search.rows == 1:
        return candidates.row_candidates(search.product)
    return candidates.tile_candidates(search.product, search.rows, card)


def _larger(found: _Search, bucket: int, trials: Trials, card: Card) -> _Search:
    """A search in a larger bucket, among what was best in a smaller one."""
    search = _Search(found.product, bucket)
    fits = candidates.fitting(found.best, found.product, bucket, card)[:_REFINED]
    search.submit([trials.current(found.product, bucket), *fits], trials)
    return search


def _decide(search: _Search, trials: Trials) -> Tuned:
    """The best few, what was used until now and the library, once more and in turn."""
    product, rows = search.product, search.rows
    if not search.times_us:
        reason = search.failures[0] if search.failures else "none fits"
        raise KernelError(f"{product}, {rows} rows: no configuration can be used: {reason}")
    before = trials.current(product, rows)
    runs_before = [before] if before in search.times_us else []
    finalists = list(dict.fromkeys([*search.best[:_NUM_FINALISTS], *runs_before]))
    *times, library_time = trials.careful_us(product, rows, [*finalists, None])
    by_config = dict(zip(finalists, times, strict=True))
    best = min(finalists, key=lambda config: by_config[config].step_us)
    if runs_before and by_config[best].step_us > (1 - _LEAST_GAIN) * by_config[before].step_us:
        best = before
    return Tuned(
        product,
        rows,
        before=before,
        before_time=by_config.get(before, Timed(float("nan"), float("nan"))),
        config=best,
        time=by_config[best],
        library_time=library_time,
        num_tried=len(search.times_us),
        failures=search.failures,
    )


# ---------------------------------------------------------------------- as a table
def key(kernel: str, product: Product) -> tables.Key:
    return tables.Key(kernel, product.num_out, product.num_in, product.paired, product.itemsize)


def entries(tuned: Iterable[Tuned], library_above: Callable[[Product], int]) -> list[tables.Entry]:
    """A table of what was found. library_above(product): the rows it began at where nothing was measured."""
    found: list[tables.Entry] = []
    by_product: dict[Product, list[Tuned]] = {}
    for one in tuned:
        kernel = "rows" if one.rows == 1 else "tiles"
        found.append(tables.Entry(key(kernel, one.product), one.rows, one.config, one.time.us))
        by_product.setdefault(one.product, []).append(one)
    for product, measured in by_product.items():
        several = sorted((one for one in measured if one.rows > 1), key=lambda one: one.rows)
        if several:
            above = _library_above(several, library_above(product))
            found.append(tables.Entry(key("library", product), None, tuning.LibraryConfig(above)))
    return found


def _library_above(measured: Sequence[Tuned], otherwise: int) -> int:
    """The last bucket, from the smallest on, in which a step with the library is not clearly faster."""
    above = 1
    for one in measured:
        if (1 - _LEAST_GAIN) * one.time.step_us > one.library_time.step_us:
            return above
        above = one.rows
    return max(above, otherwise)
