"""Who of the replicas gets a request, as what is heard of them changes; without Ray, and with a clock of the test's."""

import asyncio

import pytest

from lmtool.cluster import fleet as module
from lmtool.cluster.directory import Listing
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.routing import Prompt
from tests.cluster.front import record

SHORT = Prompt((), (), 10)


async def look() -> Listing:
    return Listing([], [])


def listing(**beats: int) -> Listing:
    return Listing([record(name, "http://here", "m", beat=beat) for name, beat in beats.items()], [])


def chosen(fleet: Fleet, *tried: str) -> str | None:
    ticket = fleet.take("m", SHORT, 1, tried)
    if ticket is not None:
        fleet.router("m").end(ticket)
    return ticket and ticket.name


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_who_says_nothing_is_asked_only_where_nobody_else_is(clock):
    fleet = Fleet(("m",), look)
    fleet.take_listing(listing(a=1, b=1))
    clock[0] += 2
    fleet.take_listing(listing(a=1, b=2))
    assert chosen(fleet) == "a"
    clock[0] += 2
    fleet.take_listing(listing(a=1, b=3))
    assert [one.name for one in fleet.ready("m")] == ["b"]
    assert [chosen(fleet), chosen(fleet, "b")] == ["b", "a"]
    fleet.take_listing(listing(a=2, b=4))
    assert chosen(fleet) == "a"


def test_while_the_directory_is_silent_nobody_else_is_blamed(clock):
    fleet = Fleet(("m",), look)
    fleet.take_listing(listing(a=1, b=1))
    clock[0] += 60
    assert chosen(fleet) == "a"


def test_what_is_under_way_goes_on_where_its_model_was_withdrawn():
    async def run() -> str:
        fleet = Fleet(("m", "n"), look)
        fleet.take_listing(listing(a=1))
        ticket = fleet.take("m", SHORT, 1, ())
        assert ticket is not None
        try:
            async with fleet.at(ticket):
                fleet.set_models(("n",))
                fleet.take_listing(listing(a=2))
                await asyncio.sleep(0)
                assert (fleet.take("m", SHORT, 1, ()), fleet.num_open) == (None, 1)
                fleet.take_listing(listing())  # its replica has ended
                await asyncio.Event().wait()
        except TimeoutError:
            return "told"
        return "waits"

    assert asyncio.run(run()) == "told"
