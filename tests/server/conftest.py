"""One server of a tiny model for all tests that do not need one of their own."""

from collections.abc import Iterator

import pytest

from tests.server.serving import Serving


@pytest.fixture(scope="session")
def serving() -> Iterator[Serving]:
    with Serving() as server:
        yield server
