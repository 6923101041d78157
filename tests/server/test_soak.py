"""2,000 requests, a third of which nobody waits for: nothing is lost, nothing is left, nobody is disturbed."""

from contextlib import closing
from dataclasses import replace

import pytest

from tests.server.serving import Serving, wait_until
from tests.server.soak import VOCABULARY, Soak
from tests.server.support import EngineInThread
from tests.support import TINY, tiny_core, tiny_decoder

NUM_REQUESTS = 2000


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_left():
    decoder = tiny_decoder(replace(TINY, vocab_size=VOCABULARY))  # SmolLM2's would be most of each step
    engine = EngineInThread(tiny_core(decoder, session_len=512, num_blocks=64), VOCABULARY)
    blocks = engine.core.scheduler.blocks
    free = blocks.num_free
    with closing(engine), Serving(engine, max_body_bytes=100_000) as server:
        soak = Soak(server.url, NUM_REQUESTS)
        soak.run()
        assert not soak.wrong, soak.wrong[:3]
        assert soak.seen["waits"] + soak.seen["leaves"] + soak.seen["rubbish"] == NUM_REQUESTS
        assert soak.seen["leaves"] > NUM_REQUESTS / 4
        assert soak.seen["left before an answer"] > 50
        wait_until(lambda: server.context.engine.num_open == 0)  # the last may have left this moment
        wait_until(lambda: not engine.core.has_work)
        wait_until(lambda: blocks.num_free == free)
    half = soak.rss_bytes[len(soak.rss_bytes) // 2]
    assert soak.rss_bytes[-1] <= 1.05 * half, soak.rss_bytes
