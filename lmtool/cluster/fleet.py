"""The replicas of all models as the front sees them: who is ready, what each has been given, whom to give what.

Reads the directory, asks `routing`, and tells requests whose replica is gone. One event loop. Knows no HTTP and no Ray.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

from lmtool.cluster.directory import Listing, Record
from lmtool.cluster.orders import FailedStart
from lmtool.cluster.routing import Prompt, Router, Ticket

_log = logging.getLogger(__name__)
_LOOK_S = 0.5
_BEATS = 2  # the first one after a failure may have begun before it
_QUIET_S = 3.0  # who says nothing for as long is asked only where nobody else is: its machine may be cut off


class Fleet:
    """models: their names. look: reads the directory. router: makes one for a model."""

    def __init__(
        self, models: Sequence[str], look: Callable[[], Awaitable[Listing]], router: Callable[[], Router] = Router
    ) -> None:
        self.models: tuple[str, ...] = ()
        self.failed: dict[str, FailedStart] = {}
        self.num_open = 0
        self._look = look
        self._records: dict[str, Record] = {}
        self._router = router
        self._routers: dict[str, Router] = {}
        self._suspects: dict[str, int] = {}  # the beat at which each failed somebody
        self._listed_s = 0.0  # when the directory answered last, by this clock
        self._beats: dict[str, tuple[int, float]] = {}  # the last one of each, and when it was seen first
        self._open: dict[str, set[asyncio.Timeout]] = {}
        self.set_models(models)

    def set_models(self, models: Sequence[str]) -> None:
        """What is asked of others goes on there, and nothing new comes."""
        self.models = tuple(models)
        self._routers = {model: self._routers.get(model) or self._router() for model in models}

    # ------------------------------------------------------------------ who there is
    async def keep_looking(self) -> None:
        """Until cancelled. While nobody answers, what was known last is what is known."""
        while True:
            try:
                self.take_listing(await self._look())
            except Exception as error:  # whatever Ray says: its requests do not come through Ray, so they go on
                _log.warning("the directory of replicas does not answer: %s", error)
            await asyncio.sleep(_LOOK_S)

    def take_listing(self, listing: Listing) -> None:
        records = {one.name: one for one in listing.replicas if one.model in self._routers or one.name in self._open}
        for name, record in records.items():
            before = self._records.get(name)
            if before is not None and 0 < before.num_starts < record.num_starts:
                _log.warning("the engine of replica %s of %s was started again", name, record.model)
                if record.model in self._routers:
                    self._routers[record.model].forget_cache(name)
        for name in self._records.keys() - records.keys():
            if self._records[name].model in self._routers:
                _log.warning("replica %s of %s is gone", name, self._records[name].model)
        self._records = records
        self._listed_s = time.monotonic()
        known = {name: self._beats.get(name, (-1, 0.0)) for name in records}
        self._beats = {
            name: known[name] if known[name][0] == record.beat else (record.beat, self._listed_s)
            for name, record in records.items()
        }
        well = {
            name for name, beat in self._suspects.items() if name not in records or records[name].beat >= beat + _BEATS
        }
        self._suspects = {name: beat for name, beat in self._suspects.items() if name not in well}
        for model, router in self._routers.items():
            router.set_replicas({one.name: one.cache_tokens for one in records.values() if one.model == model})
        self.failed = {failed.model: failed for failed in listing.failed if failed.model in self._routers}
        for name in self._open.keys() - records.keys():
            _let_go(self._open[name])

    def suspect(self, name: str) -> None:
        """It failed somebody: it is left alone until it has said again that it is well."""
        if name in self._records:
            self._suspects[name] = self._records[name].beat

    def let_all_go(self) -> None:
        """Whoever still waits for an answer does not get it."""
        for scopes in self._open.values():
            _let_go(scopes)

    def replicas(self, model: str) -> list[Record]:
        return sorted((one for one in self._records.values() if one.model == model), key=lambda one: one.name)

    def ready(self, model: str) -> list[Record]:
        """Who takes requests, and was heard of just now."""
        return [one for one in self._trusted(model) if self._is_lively(one.name)]

    def _trusted(self, model: str) -> list[Record]:
        """With those whose machine may be cut off: where there is nobody else, they are worth a try."""
        return [one for one in self.replicas(model) if one.is_ready and one.name not in self._suspects]

    def _is_lively(self, name: str) -> bool:
        return self._listed_s - self._beats[name][1] < _QUIET_S

    def router(self, model: str) -> Router:
        return self._routers[model]

    # ------------------------------------------------------------------ requests
    def model_of(self, name: str) -> str | None:
        """Whose replica it is."""
        record = self._records.get(name)
        return record.model if record is not None and record.model in self._routers else None

    def take(
        self, model: str, prompt: Prompt, num_new_tokens: int, tried: Collection[str], only: str | None = None
    ) -> Ticket | None:
        """A place for a request, at none of those that were tried, or at one alone; None where there is none."""
        names = [one.name for one in self._trusted(model) if one.name not in tried and only in (None, one.name)]
        lively = [name for name in names if self._is_lively(name)]
        router = self._routers.get(model)  # None: the model was withdrawn meanwhile
        return router.take(prompt, num_new_tokens, lively or names) if router else None

    @contextlib.asynccontextmanager
    async def at(self, ticket: Ticket) -> AsyncIterator[Record]:
        """While the request is there. Raises TimeoutError inside the block when the replica is gone."""
        record = self._records[ticket.name]
        scopes = self._open.setdefault(ticket.name, set())
        self.num_open += 1
        try:
            async with asyncio.timeout(None) as scope:
                scopes.add(scope)
                yield record
        finally:
            self.num_open -= 1
            scopes.discard(scope)
            if not scopes:
                self._open.pop(ticket.name, None)
            Router.end(ticket)


def _let_go(scopes: Collection[asyncio.Timeout]) -> None:
    for scope in list(scopes):
        scope.reschedule(asyncio.get_running_loop().time())
