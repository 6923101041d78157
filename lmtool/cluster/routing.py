"""Which replica a request goes to: the one that has most of its beginning in its cache, unless too much waits there.

Plain data and no clock: the same calls give the same choices, but where chance is asked for. Knows neither HTTP nor
Ray. A `Router` is for one model.
"""

import random
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

_NEARLY_EVEN = 4  # queues within a quarter of each other count as even


class Policy(StrEnum):
    """By what a replica is chosen."""

    PREFIX = "prefix"
    LEAST_QUEUED = "least-queued"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Prompt:
    """hashes: of its beginnings, the shortest first, each chained over those before; ends: tokens up to there."""

    hashes: tuple[int, ...]
    ends: tuple[int, ...]
    num_tokens: int


@dataclass(slots=True)
class _Replica:
    """What its cache holds, as far as can be told from outside: the tokens that were used last, as many as fit."""

    cache_tokens: int
    queued_tokens: int = 0
    seen_tokens: int = 0
    seen: OrderedDict[int, int] = field(default_factory=OrderedDict)  # hash -> tokens; longest unused first

    def num_found_tokens(self, prompt: Prompt) -> int:
        """Up to the end of the longest beginning that is known. The shorter ones are then known, too."""
        for one, end in zip(reversed(prompt.hashes), reversed(prompt.ends), strict=True):
            if one in self.seen:
                return end
        return 0

    def remember(self, prompt: Prompt) -> None:
        starts = (0, *prompt.ends)
        for number in reversed(range(len(prompt.hashes))):  # so the longest is the first to be forgotten
            one = prompt.hashes[number]
            self.seen_tokens -= self.seen.pop(one, 0)
            self.seen[one] = max(1, prompt.ends[number] - starts[number])
            self.seen_tokens += self.seen[one]
        while self.seen_tokens > self.cache_tokens:
            self.seen_tokens -= self.seen.popitem(last=False)[1]

    def forget(self) -> None:
        self.seen.clear()
        self.seen_tokens = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """A request at a replica, by name. num_tokens: of it that are still to be computed, as far as is known."""

    name: str
    num_tokens: int
    replica: _Replica = field(repr=False)


class Router:
    """Of the replicas of one model: what each has seen, and what it has been given and not finished.

    The rule. A replica attracts by its cache as long as its queue is not longer than the shortest one by more than

        what it would save (tokens of the beginning that it has) + a quarter of the shortest queue

    because a token that is waited for costs about as much as one that is computed again, so waiting for more is dearer
    than computing; and because with many requests in flight queues differ by chance, and following that difference
    would scatter conversations for nothing. Among those: the longest beginning; then the fewest queued tokens; then who
    remembers least, so that what is new spreads over all caches; then by name.

    A replica's memory here is as large as its cache is: what it cannot have any more does not attract.

    This is PREFIX. The others are there to compare with. chance: for RANDOM alone.
    """

    def __init__(self, policy: Policy = Policy.PREFIX, chance: random.Random | None = None) -> None:
        self._policy = policy
        self._chance = chance or random.Random()  # noqa: S311  # no secret depends on it
        self._replicas: dict[str, _Replica] = {}

    # ------------------------------------------------------------------ who there is
    def set_replicas(self, cache_tokens: Mapping[str, int]) -> None:
        """Their names, and how many tokens the cache of each holds. Those that are gone are forgotten with all that
        they had: who comes back begins with an empty cache.
        """
        for name in [name for name in self._replicas if name not in cache_tokens]:
            del self._replicas[name]
        for name, tokens in cache_tokens.items():
            self._replicas.setdefault(name, _Replica(tokens)).cache_tokens = tokens

    def forget_cache(self, name: str) -> None:
        """Of a replica whose engine was started again."""
        if name in self._replicas:
            self._replicas[name].forget()

    # ------------------------------------------------------------------ requests
    def take(self, prompt: Prompt, num_new_tokens: int, candidates: Collection[str]) -> Ticket | None:
        """Choose one of the candidates, and count the request there until `end`; None where none of them is known."""
        name = self.choose(prompt, candidates)
        if name is None:
            return None
        replica = self._replicas[name]
        ticket = Ticket(name, prompt.num_tokens - replica.num_found_tokens(prompt) + num_new_tokens, replica)
        replica.remember(prompt)
        replica.queued_tokens += ticket.num_tokens
        return ticket

    def choose(self, prompt: Prompt, candidates: Collection[str]) -> str | None:
        found = {name: self._replicas[name] for name in candidates if name in self._replicas}
        if not found:
            return None
        if self._policy is Policy.RANDOM:
            return self._chance.choice(sorted(found))
        if self._policy is Policy.LEAST_QUEUED:
            return min(found, key=lambda name: (found[name].queued_tokens, name))
        least = min(replica.queued_tokens for replica in found.values())
        ranked: list[tuple[int, int, int, str]] = []
        for name, replica in found.items():
            num_found = replica.num_found_tokens(prompt)
            if replica.queued_tokens - least <= num_found + least // _NEARLY_EVEN:  # so is the one with the least
                ranked.append((-num_found, replica.queued_tokens, replica.seen_tokens, name))
        return min(ranked)[-1]

    @staticmethod
    def end(ticket: Ticket, num_tokens: int | None = None) -> None:
        """``num_tokens`` of the request have been done; None: it is over. Harmless when it is over already."""
        done = ticket.num_tokens if num_tokens is None else min(num_tokens, ticket.num_tokens)
        ticket.num_tokens -= done
        ticket.replica.queued_tokens -= done

    # ------------------------------------------------------------------ figures
    def queued_tokens(self, name: str) -> int:
        return self._replicas[name].queued_tokens if name in self._replicas else 0

    def remembered_tokens(self, name: str) -> int:
        return self._replicas[name].seen_tokens if name in self._replicas else 0
