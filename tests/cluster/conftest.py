"""Two real servers of a tiny model, each with an engine of its own, and a front to them; without Ray."""

import pytest

from tests.server.serving import Serving


@pytest.fixture(scope="module")
def servers():
    from tests.cluster.front import KEY

    def serving(name: str) -> Serving:
        return Serving(model_names=("one",), api_keys=(KEY,), replica=name)

    with serving("a") as first, serving("b") as second:
        yield first, second


@pytest.fixture
def front(servers):
    from tests.cluster.front import Front, record  # which needs aiohttp

    with Front("one", "two") as made:
        made.list(record("a", servers[0].url), record("b", servers[1].url))
        yield made
