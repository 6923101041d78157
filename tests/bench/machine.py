"""A machine whose steps take known times, with continuous batching, request by request: what a plan's arithmetic is
compared with. A closed loop of it gives a curve, Poisson arrivals what came true. In virtual time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmtool.bench.online_figures import Outcome

StepTime = Callable[[int, int], float]  # (sequences that go on, sequences that join) → seconds


@dataclass
class Asked:
    """num_tokens: of its answer; token_s: when each came."""

    came_s: float
    num_tokens: int
    token_s: list[float] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.came_s, self.token_s, 100, self.num_tokens, counted=True)


@dataclass
class Machine:
    step_s: StepTime
    num_slots: int
    now_s: float = 0.0
    waiting: deque[Asked] = field(default_factory=deque)
    running: list[Asked] = field(default_factory=list)
    ended: list[Asked] = field(default_factory=list)

    @property
    def num_tokens_to_come(self) -> int:
        return sum(one.num_tokens - len(one.token_s) for one in (*self.waiting, *self.running))

    def ask(self, one: Asked) -> None:
        if not self.waiting and not self.running:
            self.now_s = max(self.now_s, one.came_s)
        self.waiting.append(one)

    def run_until(self, until_s: float) -> None:
        """Every step that begins before then."""
        while self.now_s < until_s and (self.waiting or self.running):
            self.step()

    def step(self) -> None:
        """Who waits joins while there are slots, and gets its first token at the end of the step."""
        num_going_on = len(self.running)
        while self.waiting and len(self.running) < self.num_slots:
            self.running.append(self.waiting.popleft())
        self.now_s += self.step_s(num_going_on, len(self.running) - num_going_on)
        for one in self.running:
            one.token_s.append(self.now_s)
        self.ended += [one for one in self.running if len(one.token_s) == one.num_tokens]
        self.running = [one for one in self.running if len(one.token_s) < one.num_tokens]


def closed_loop(step_s: StepTime, num_slots: int, concurrency: int, lengths: Sequence[int]) -> list[Outcome]:
    """So many clients, each of which asks again when it is answered: too late for the step that begins just then."""
    machine, to_send, sent = Machine(step_s, num_slots), deque(lengths), []

    def send(count: int) -> list[Asked]:
        asked = [Asked(machine.now_s, to_send.popleft()) for _ in range(min(count, len(to_send)))]
        sent.extend(asked)
        return asked

    late = send(concurrency)
    while late or machine.waiting or machine.running:
        if machine.waiting or machine.running:
            before = len(machine.ended)
            machine.step()
            new = send(len(machine.ended) - before)
        else:
            new = []
        for one in late:
            machine.ask(one)
        late = new
    return [one.outcome for one in sent]


def poisson(
    step_s: StepTime,
    num_slots: int,
    rate: float,
    output_len: int,
    num_replicas: int,
    *,
    routing: str,
    count: int = 6000,
) -> list[Outcome]:
    """What clients of a front see; the first tenth, when the queues are empty, is left out."""
    random = np.random.default_rng(7)
    machines = [Machine(step_s, num_slots) for _ in range(num_replicas)]
    came_s = np.cumsum(random.exponential(1 / rate, count)).tolist()
    for when_s, length in zip(came_s, random.integers(1, 2 * output_len, size=count).tolist(), strict=True):
        for machine in machines:
            machine.run_until(when_s)
        shortest = min(machines, key=lambda one: one.num_tokens_to_come)
        chosen = shortest if routing == "least-queued" else machines[int(random.integers(num_replicas))]
        chosen.ask(Asked(when_s, length))
    for machine in machines:
        machine.run_until(float("inf"))
    return [one.outcome for machine in machines for one in machine.ended if one.came_s >= came_s[count // 10]]
