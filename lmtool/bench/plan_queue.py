"""A replica that requests come to one by one: how many it has at a time, and how long first tokens and gaps then take.

Method. Requests come as a Poisson process of rate a. The replica is a *flow-equivalent* server (Chandy, Herzog, Woo,
"Parametric analysis of queuing networks", IBM J. Res. Dev. 19(1), 1975): with n requests it ends as many a second,
X(n), as were measured in a closed loop of n. The number of requests in it is then a birth-death process,

    p(n) = p(0) · a^n / (X(1) · … · X(n)),          stable where a < X(N), the rate with the most that were measured,

whatever the lengths are distributed like, as all share the machine (processor sharing is insensitive). Who comes finds
n with probability p(n) (Wolff, "Poisson arrivals see time averages", Oper. Res. 30(2), 1982) and makes them n + 1, so
its first token takes as long as first tokens took in the closed loop of n + 1 (in closed networks an arrival sees the
network without itself: Lavenberg, Reiser, J. Appl. Prob. 17, 1980). Tokens come at rate p(n) · X(n) = a · p(n - 1):
gaps have the same weights.

With more than N at once, who comes waits for its turn besides, (n + 1 - N) / X(N) seconds. Work that waits in a row is
the less uneven the more of it is prompts, and the queue the shorter: beyond N, p falls by (a / X(N)) ^ (2 / (1 + c²)) a
request, c² being the squared variation of a request's work. That is what queues come to in heavy traffic (Kingman, "On
queues in heavy traffic", J. R. Stat. Soc. B 24, 1962), and exactly the above where c² is 1.

A real closed loop is a little behind: a next request just misses the step that begins then, and waits for all of it.
Under Poisson arrivals one waits for the rest of a step, but longer ones are met more often, and prompts come in clumps:
medians come out a little long, 99th percentiles a little short. How far off all this is against machines of known
speed is in `tests/bench/test_plan.py`.
"""

from dataclasses import dataclass

import numpy as np

from lmtool.bench.plan_replica import SHARES, Floats, Replica

MOST_UTILIZED = 0.99  # at which a queue is a hundred requests long: what is beyond is called too much
_LEAST_PROBABILITY = 1e-9
_LEAST_SEEN = 1e-6  # probability of a number at once that is looked at
_POINTS = 200  # of each distribution that is mixed


@dataclass(frozen=True, slots=True)
class Times:
    """values [n] in seconds, ascending; up_to [n]: the share of all times that is no longer."""

    values: Floats
    up_to: Floats

    def percentile(self, percent: float) -> float:
        return float(np.interp(percent / 100, self.up_to, self.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """mean_at_once: requests in the replica, those that wait included. beyond: the share that finds N or more."""

    mean_at_once: float
    beyond: float
    first_token: Times
    gap: Times


def steady_state(replica: Replica, rate: float) -> Steady:
    """Requests come at ``rate`` a second, more than none and less than the replica carries."""
    used = rate / replica.capacity
    assert 0 < used < 1, used
    found = _probabilities(replica, rate)
    most = replica.most_at_once
    seen = np.flatnonzero(found > _LEAST_SEEN)
    row = np.minimum(seen, most - 1)  # who finds n is one of n + 1, whose row is n
    waits_s = np.maximum(seen + 1 - most, 0) / replica.capacity
    return Steady(
        mean_at_once=float(found @ np.arange(len(found))),
        beyond=float(found[most:].sum()),
        first_token=_mixed(found[seen], replica.first_token_s[row] + waits_s[:, None]),
        gap=_mixed(found[seen], replica.gap_s[row]),
    )


def _probabilities(replica: Replica, rate: float) -> Floats:
    """p(0), p(1), …, up to where what is left out is nothing."""
    fall = np.log(rate / replica.capacity) * 2 / (1 + replica.work_variation)
    tail = int(np.ceil(np.log(_LEAST_PROBABILITY) / fall))
    falls = np.concatenate([np.log(rate / replica.requests_per_s), np.full(tail, fall)])
    logs = np.concatenate([[0.0], np.cumsum(falls)])
    weights = np.exp(logs - logs.max())
    found: Floats = weights / weights.sum()
    return found


def _mixed(weights: Floats, quantiles: Floats) -> Times:
    """weights [S] of distributions, each by its quantiles [S, 5] at `SHARES`; between two of them they are lines."""
    points = (np.arange(_POINTS) + 0.5) / _POINTS
    values = np.concatenate([np.interp(points, list(SHARES.values()), one) for one in quantiles])
    shares = np.repeat(weights / weights.sum() / _POINTS, _POINTS)
    order = np.argsort(values)
    return Times(values[order], np.cumsum(shares[order]))
