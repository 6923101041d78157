"""How many replicas a load needs so that its first tokens and its gaps keep their targets. Plain numbers.

Behind a front that sends each request to the replica with the shortest queue, as `serve proxy` does, replicas are as
one that is so many times as large (`Replica.together`). Behind one that sends them anywhere each gets its part of them
as a Poisson process of its own, and waits longer. What such a one then does is in `plan_queue`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lmtool.bench.plan_queue import MOST_UTILIZED, Steady, steady_state
from lmtool.bench.plan_replica import Replica
from lmtool.errors import ConfigError

_MOST_REPLICAS = 1024  # as of `serve proxy`
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
ROUTINGS = ("least-queued", "random")  # as `serve proxy` calls them
RATE, FIRST_TOKEN, GAP = "rate", "first token", "between tokens"  # what a number of replicas may fail by


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """rate: requests a second, Poisson; mean lengths in tokens; routing: one of `ROUTINGS`."""

    rate: float
    input_len: float
    output_len: float
    routing: str = "least-queued"

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ConfigError(f"--routing is {self.routing!r}", f"give {' or '.join(ROUTINGS)}")
        for flag, value in (("--rate", self.rate), ("--in", self.input_len), ("--out", self.output_len)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{flag} is {value:g}", "give a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """percentile: of the first tokens and of the gaps, these shares of which are to take no longer; seconds."""

    first_token_s: float | None
    gap_s: float | None
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.first_token_s is None and self.gap_s is None:
            raise ConfigError("there is no target", "give --target-ttft SECONDS, --target-itl MILLISECONDS or both")
        for flag, value in (("--target-ttft", self.first_token_s), ("--target-itl", self.gap_s)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag} is {value:g}", "give a time above 0")
        if self.percentile not in PERCENTILES:
            known = ", ".join(f"{one:g}" for one in PERCENTILES)
            raise ConfigError(f"--percentile is {self.percentile:g}", f"give one of {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What so many replicas do. state: of all, or with random routing of each; None: more comes than they carry.
    misses: by what they fail.
    """

    num_replicas: int
    utilization: float
    state: Steady | None
    misses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """forecasts: of one less than needed (where that is any), of as many, of one more. notes: what was reckoned only.

    bottleneck: what one less would fail by, or, where one is enough, what is nearest to its target.
    """

    num_replicas: int
    bottleneck: str
    forecasts: tuple[Forecast, ...]
    notes: tuple[str, ...]

    def forecast(self, num_replicas: int) -> Forecast | None:
        return next((one for one in self.forecasts if one.num_replicas == num_replicas), None)


def forecast(replica: Replica, load: Load, targets: Targets, num_replicas: int) -> Forecast:
    """Of ``num_replicas`` that share the load."""
    used = load.rate / (num_replicas * replica.capacity)
    if used > MOST_UTILIZED:
        return Forecast(num_replicas=num_replicas, utilization=used, state=None, misses=(RATE,))
    if load.routing == "least-queued":
        state = steady_state(replica.together(num_replicas), load.rate)
    else:
        state = steady_state(replica, load.rate / num_replicas)
    return Forecast(num_replicas=num_replicas, utilization=used, state=state, misses=_misses(state, targets))


def _shares(state: Steady, targets: Targets) -> dict[str, float]:
    """How much of each target is used up; above 1 it is missed."""
    found = {}
    if targets.first_token_s is not None:
        found[FIRST_TOKEN] = state.first_token.percentile(targets.percentile) / targets.first_token_s
    if targets.gap_s is not None:
        found[GAP] = state.gap.percentile(targets.percentile) / targets.gap_s
    return found


def _misses(state: Steady, targets: Targets) -> tuple[str, ...]:
    return tuple(name for name, share in _shares(state, targets).items() if share > 1)


def size(replica: Replica, load: Load, targets: Targets) -> Sizing:
    """The fewest replicas that keep the targets.

    Raises ConfigError for a target that a replica misses though it has nothing else to do.
    """
    _check_reachable(replica, targets)

    def of(num_replicas: int) -> Forecast:
        return forecast(replica, load, targets, num_replicas)

    carrying = math.ceil(load.rate / (MOST_UTILIZED * replica.capacity))
    needed = _fewest(of, max(1, carrying), load)
    found = tuple(of(count) for count in range(max(1, needed - 1), needed + 2))
    notes = list(replica.notes)
    state = of(needed).state
    if state is not None and state.beyond > 1 - targets.percentile / 100:
        notes.append(
            f"extrapolated: {state.beyond:.0%} of the requests find {replica.most_at_once} or more at each replica,"
            " the most that was measured"
        )
    return Sizing(
        num_replicas=needed, bottleneck=_bottleneck(found, needed, targets), forecasts=found, notes=tuple(notes)
    )


def _check_reachable(replica: Replica, targets: Targets) -> None:
    """With one request at a time, which is what very many replicas come to."""
    alone = steady_state(replica, replica.capacity * 1e-6)
    name = f"p{targets.percentile:g}"
    first_s, gap_s = (times.percentile(targets.percentile) for times in (alone.first_token, alone.gap))
    if targets.first_token_s is not None and first_s > targets.first_token_s:
        raise ConfigError(
            f"--target-ttft is {targets.first_token_s:g} s, an empty replica takes {first_s:.3g} s ({name})",
            f"give more than {first_s:.3g}, shorter prompts, or a faster replica (--tp)",
        )
    if targets.gap_s is not None and gap_s > targets.gap_s:
        raise ConfigError(
            f"--target-itl is {targets.gap_s * 1e3:g} ms, an empty replica takes {gap_s * 1e3:.3g} ms ({name})",
            f"give more than {gap_s * 1e3:.3g}, or a faster replica (--tp)",
        )


def _fewest(of: Callable[[int], Forecast], least: int, load: Load) -> int:
    """More replicas have fewer requests each, and take no longer. least: as many as carry the load at all."""
    low, high = least - 1, least  # low fails, or is nothing
    while high <= _MOST_REPLICAS and of(high).misses:
        low, high = high, 2 * high
    if high > _MOST_REPLICAS and (low >= _MOST_REPLICAS or of(_MOST_REPLICAS).misses):
        raise ConfigError(
            f"{_MOST_REPLICAS:,} replicas do not keep the targets at --rate {load.rate:g}",
            "give a lower rate, or targets further from what an empty replica takes",
        )
    high = min(high, _MOST_REPLICAS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle).misses else (low, middle)
    return high


def _bottleneck(forecasts: tuple[Forecast, ...], needed: int, targets: Targets) -> str:
    fewer = forecasts[0] if forecasts[0].num_replicas < needed else None
    if fewer is not None:
        return fewer.misses[0] if len(fewer.misses) == 1 else " and ".join(fewer.misses)
    state = forecasts[0].state
    assert state is not None
    shares = _shares(state, targets)
    return max(shares, key=lambda name: shares[name])
