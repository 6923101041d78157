"""What replicas say and fronts read, without Ray and with a clock of the test's own."""

import pytest

from lmtool.cluster import directory as module
from lmtool.cluster.directory import LIVE_S, Directory, Record
from lmtool.cluster.orders import FailedStart
from lmtool.errors import ConfigError, LmtoolError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_who_is_silent_is_gone_and_who_says_so_too(clock):
    one = Directory()
    for name in ("x", "y", "z"):
        one.put(Record(name, "m", "http://here", "key"))
    clock[0] += LIVE_S - 1
    one.put(Record("x", "m", "http://here", "key", beat=2))
    one.drop("z")
    one.drop("nobody")
    assert [(found.name, found.beat) for found in one.listing("front").replicas] == [("x", 2), ("y", 0)]
    clock[0] += 1
    assert [found.name for found in one.listing("front").replicas] == ["x"]


def test_a_failed_start_is_told_until_another_succeeds(clock):
    one = Directory()
    failed = FailedStart.of("m", ConfigError("this is wrong", "do that"))
    one.fail(failed)
    one.put(Record("x", "m", "", ""))
    assert one.listing("front").failed == [failed]
    one.put(Record("x", "m", "", "", is_ready=True))
    assert one.listing("front").failed == []
    one.fail(failed)
    assert one.claim("front", ("m",)) == []
    assert one.listing("front").failed == []


def test_an_error_comes_out_as_it_went_in():
    error = FailedStart.of("m", ConfigError("this is wrong", "do that")).error()
    assert (type(error), str(error)) == (ConfigError, "this is wrong; do that")
    assert type(FailedStart("m", "Unheard", "x", None).error()) is LmtoolError


def test_models_belong_to_one_front_as_long_as_it_lives(clock):
    one = Directory()
    assert one.claim("first", ("a", "b")) == []
    assert one.claim("second", ("b", "c")) == ["b"]
    assert one.claim("third", ("c",)) == []  # the second took nothing
    clock[0] += LIVE_S - 1
    one.listing("first")
    clock[0] += LIVE_S - 1
    assert one.claim("second", ("a", "c")) == ["a"]
    one.release("first", ("a",))
    assert one.claim("second", ("b", "c")) == ["b"]
    one.release("first", ("b", "x"))
    one.release("nobody", ("c",))
    assert one.claim("second", ("a", "b", "c")) == []  # and the third was silent
    assert one.claim("second", ("a",)) == []


def test_a_key_is_not_shown():
    assert "hidden" not in repr(Record("x", "m", "http://here", "hidden"))
