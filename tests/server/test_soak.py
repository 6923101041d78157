"""2,000 requests, a third of which nobody waits for: nothing is lost, nothing is left, nobody is disturbed."""

import pytest

from tests.server.serving import Serving, wait_until
from tests.server.soak import Soak
from tests.server.support import tiny_engine

NUM_REQUESTS = 2000


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_left():
    engine = tiny_engine()
    blocks = engine.core.scheduler.blocks
    free = blocks.num_free
    with Serving(engine, max_body_bytes=100_000) as server:
        soak = Soak(server.url, NUM_REQUESTS)
        soak.run()
        assert not soak.wrong, soak.wrong[:3]
        assert soak.seen["waits"] + soak.seen["leaves"] + soak.seen["rubbish"] == NUM_REQUESTS
        assert soak.seen["leaves"] > NUM_REQUESTS / 4
        assert soak.seen["left before an answer"] > 50
        assert server.context.engine.num_open == 0
        wait_until(lambda: not engine.core.has_work)
        wait_until(lambda: blocks.num_free == free)
    engine.close()
    half = soak.rss_bytes[len(soak.rss_bytes) // 2]
    assert soak.rss_bytes[-1] <= 1.05 * half, soak.rss_bytes
