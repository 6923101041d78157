"""The engine and transformers on the same cases, in turn, so that a noisy machine hits both alike.

A decode case is judged by the median time of its steps, so that prefill does not count. Knows no report.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lmtool.bench import offline, roofline
from lmtool.bench.limits import Limits
from lmtool.bench.workloads import Prompt, Workload, prefill, static
from lmtool.engine.setup import LoadedEngine

_TRIED_TOKENS = 5  # that come out of a decode case while dtypes are tried
_TRIED_CONTEXT = 16  # tokens before them
_TRIED_PREFILL = 128
_TRIED_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """num_requests at once; num_new_tokens 1: the prefill alone is timed."""

    name: str
    num_requests: int
    input_len: int
    num_new_tokens: int
    bar: float | None = None  # lmtool over transformers, issue by issue
    goal: float | None = None

    @property
    def workload(self) -> Workload:
        if self.num_new_tokens == 1:
            return prefill(self.input_len)
        return static(self.num_requests, self.input_len, self.num_new_tokens)

    @property
    def tokens_per_time(self) -> int:
        """Tokens that one timed thing (a step, or the prefill) takes in or gives out."""
        return self.input_len if self.num_new_tokens == 1 else self.num_requests


# what an engine for laptops must reach on a CPU against transformers at its best dtype: (bar, goal)
CPU_BARS: dict[tuple[str, int], tuple[float, float | None]] = {
    ("decode", 1): (2.0, 3.0),
    ("decode", 8): (1.4, None),
    ("prefill", 512): (1.0, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Medians in tokens per second; ratio: ours over theirs. ok: None where there is no bar."""

    name: str
    ours: str  # how our weights are stored
    ours_tokens_per_s: float
    theirs: str  # their best dtype
    theirs_tokens_per_s: float
    ratio: float
    bar: float | None
    goal: float | None
    ok: bool | None
    limit_tokens_per_s: float | None
    limit_ratio: float | None


class Contestant(Protocol):
    """``step_times``: seconds to the first tokens of equally long prompts, and of each later step."""

    name: str

    def step_times(self, prompts: Sequence[Prompt], num_new_tokens: int) -> tuple[float, list[float]]: ...


class EngineContestant:
    def __init__(self, loaded: LoadedEngine) -> None:
        self.name = loaded.weights
        self._core = loaded.core

    def step_times(self, prompts: Sequence[Prompt], num_new_tokens: int) -> tuple[float, list[float]]:
        run = offline.drive(self._core, offline.greedy_requests(prompts, [num_new_tokens] * len(prompts)))
        return max(run.first_token_s.values()), run.decode_step_s()


def cases(batches: Iterable[int], input_len: int, num_new_tokens: int, prefill_len: int, *, cpu: bool) -> list[Case]:
    """Decoding at each batch size and, unless its length is 0, one prefill; with the bars of `CPU_BARS` on a CPU."""

    def case(kind: str, size: int, num_requests: int, num_in: int, num_new: int) -> Case:
        bar, goal = CPU_BARS.get((kind, size), (None, None)) if cpu else (None, None)
        return Case(f"{kind} {'b' if kind == 'decode' else ''}{size}", num_requests, num_in, num_new, bar, goal)

    found = [case("decode", batch, batch, input_len, num_new_tokens) for batch in batches]
    return [*found, case("prefill", prefill_len, 1, prefill_len, 1)] if prefill_len else found


def compare(
    loaded: LoadedEngine,
    peers: Sequence[Contestant],
    wanted: Sequence[Case],
    *,
    limits: Limits | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Comparison]:
    """Each case against whichever of ``peers`` (the same model in several dtypes) is fastest in it."""
    ours = EngineContestant(loaded)
    vocab_size = loaded.model.vocab_size
    comparisons = []
    for case in wanted:
        progress(f"{case.name}: trying transformers in {', '.join(peer.name for peer in peers)}")
        theirs = _fastest(peers, case, vocab_size)
        progress(f"{case.name}: lmtool ({ours.name}) and transformers ({theirs.name}) in turn")
        times: dict[Contestant, list[float]] = {ours: [], theirs: []}
        for contestant in times:
            _times_s(contestant, replace(case, num_new_tokens=min(case.num_new_tokens, 2)), vocab_size, seed=repeats)
        for i in range(repeats):
            for contestant, seen in times.items():
                seen.append(statistics.median(_times_s(contestant, case, vocab_size, seed=i)))
        rates = [case.tokens_per_time / statistics.median(seen) for seen in times.values()]
        comparisons.append(_judge(case, ours.name, theirs.name, rates, _limit(loaded, case, limits)))
    return comparisons


def _times_s(contestant: Contestant, case: Case, vocab_size: int, seed: int) -> list[float]:
    """Of one run: of the prefill, or of each decode step."""
    first_s, steps_s = contestant.step_times(case.workload.prompts(vocab_size, seed), case.num_new_tokens)
    return [first_s] if case.num_new_tokens == 1 else steps_s


def _fastest(peers: Sequence[Contestant], case: Case, vocab_size: int) -> Contestant:
    """By the shortest time, which a neighbour on the machine cannot lengthen in every one of several rounds.

    Prompts and answers are short: a hopeless dtype takes minutes for whole ones.
    """
    if len(peers) == 1:
        return peers[0]
    length = _TRIED_PREFILL if case.num_new_tokens == 1 else _TRIED_CONTEXT
    small = replace(case, input_len=min(case.input_len, length), num_new_tokens=min(case.num_new_tokens, _TRIED_TOKENS))
    shortest = dict.fromkeys(peers, math.inf)
    for seed in range(_TRIED_ROUNDS):
        for peer in peers:
            shortest[peer] = min(shortest[peer], *_times_s(peer, small, vocab_size, seed))
    return min(peers, key=lambda peer: shortest[peer])


def _limit(loaded: LoadedEngine, case: Case, limits: Limits | None) -> float | None:
    """Tokens per second of the ideal machine, at the context that a decode case has half-way."""
    cost = offline.engine_cost(loaded)
    if limits is None or cost is None:
        return None
    rates = limits.read_bytes_per_s, limits.matmul_flops_per_s
    if case.num_new_tokens == 1:
        budget = loaded.core.scheduler.max_batched_tokens
        run, _ = roofline.ideal_run(case.workload, cost, *rates, max_batch_size=1, max_batched_tokens=budget)
        return case.input_len / run.duration_s
    context = case.input_len + case.num_new_tokens // 2
    return case.num_requests / roofline.decode_step(cost, case.num_requests, context).duration_s(*rates)


def _judge(case: Case, ours: str, theirs: str, rates: Sequence[float], limit: float | None) -> Comparison:
    ratio = rates[0] / rates[1]
    return Comparison(
        name=case.name,
        ours=ours,
        ours_tokens_per_s=rates[0],
        theirs=theirs,
        theirs_tokens_per_s=rates[1],
        ratio=ratio,
        bar=case.bar,
        goal=case.goal,
        ok=None if case.bar is None else ratio >= case.bar,
        limit_tokens_per_s=limit,
        limit_ratio=None if limit is None else rates[0] / limit,
    )
