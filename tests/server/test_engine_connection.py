"""HTTP process and engine over the real wire: answers, aborts, a process that goes away."""

import asyncio
import socket
import sys
import threading

import pytest

from lmtool.config import GenerationConfig
from lmtool.engine.frames import Codec
from lmtool.errors import EngineError, RequestError
from lmtool.server.errors import Refusal
from lmtool.server.generate import Answers
from lmtool.server.wire import Failure, Output
from tests.server.serving import TIMEOUT_S
from tests.server.support import tiny_context, tiny_engine

PROMPT = list(range(100, 170))


def greedy(count: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=count, ignore_eos=True)


async def wait_until(condition) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


def test_answers_are_the_same_together_and_alone():
    async def ask(context, offset):
        request = context.maker.request([i + offset for i in PROMPT], greedy(12))
        async with Answers(context, [request]) as answers:
            return (await answers.whole())[0]

    async def main():
        async with tiny_context() as context:
            together = await asyncio.gather(*(ask(context, i) for i in range(6)))
            alone = [await ask(context, i) for i in range(6)]
        for one, other in zip(together, alone, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.finish_reason, one.num_generated_tokens, one.num_prompt_tokens) == ("length", 12, 70)
            assert one.num_cached_tokens == 0
            assert other.num_cached_tokens >= 64  # told with the first token, kept to the end

    asyncio.run(main())


def test_who_leaves_frees_the_blocks():
    async def main():
        engine = tiny_engine()
        try:
            async with tiny_context(engine) as context:
                blocks = engine.core.scheduler.blocks
                before = blocks.num_free
                async with Answers(context, [context.maker.request(PROMPT, greedy(400))]) as answers:
                    async for _ in answers:
                        break
                    assert context.engine.num_open == 1
                assert context.engine.num_open == 0
                await wait_until(lambda: blocks.num_free == before and not engine.core.scheduler.running)
        finally:
            engine.close()

    asyncio.run(main())


def test_a_process_that_goes_away_takes_its_requests_along():
    async def main():
        engine = tiny_engine()
        try:
            async with tiny_context(engine) as context:
                context.engine.submit([context.maker.request(PROMPT, greedy(400))])
                await wait_until(lambda: engine.core.scheduler.running)
            await wait_until(lambda: not engine.core.scheduler.has_work)
        finally:
            engine.close()

    asyncio.run(main())


def test_when_the_engine_goes_away_who_waits_is_told():
    async def main():
        engine = tiny_engine()
        async with tiny_context(engine) as context:
            async with Answers(context, [context.maker.request(PROMPT, greedy(400))]) as answers:
                with engine.held():  # else the answer may be whole before that
                    closing = asyncio.create_task(asyncio.to_thread(engine.close))
                    with pytest.raises(EngineError):
                        await answers.whole()
                await closing
            await wait_until(lambda: context.engine.info is None)
            with pytest.raises(Refusal, match="started again"):
                context.info  # noqa: B018

    asyncio.run(main())


def test_heartbeats_come_from_the_engine():
    async def main():
        async with tiny_context() as context:
            await wait_until(lambda: context.engine.stats is not None)
            assert context.engine.stats.num_free_blocks > 0
            assert "num_steps" in context.engine.stats.counters

    asyncio.run(main())


def test_too_many_are_refused():
    async def main():
        async with tiny_context(max_queue=0) as context:
            requests = [context.maker.request(PROMPT, greedy(50)) for _ in range(4)]
            async with Answers(context, requests):
                with pytest.raises(Refusal) as refused:
                    Answers(context, [context.maker.request(PROMPT, greedy(1))])
                assert (refused.value.status, refused.value.retry_after_s) == (429, 1)

    asyncio.run(main())


def test_an_answer_has_a_deadline():
    async def main():
        engine = tiny_engine()
        try:
            async with tiny_context(engine, request_timeout_s=0.05) as context:
                with pytest.raises(Refusal) as refused:
                    async with Answers(context, [context.maker.request(PROMPT, greedy(400))]) as answers:
                        await answers.whole()
                assert refused.value.status == 504
                await wait_until(lambda: not engine.core.scheduler.has_work)
        finally:
            engine.close()

    asyncio.run(main())


def test_an_error_crosses_as_what_it_is():
    codec = Codec(Output)
    failed = Output(1, None, "error", failure=Failure.of(RequestError("a", "b")))
    (heard,) = codec.feed(codec.encode(failed))
    error = heard.output().error
    assert (type(error), str(error)) == (RequestError, "a; b")


def test_what_is_no_message_ends_the_connection_only():
    async def main():
        engine = tiny_engine()
        try:
            with socket.socket(socket.AF_UNIX) as rogue:
                rogue.connect(str(engine.path))
                rogue.sendall(b"\x04\x00\x00\x00junk")
                while await asyncio.to_thread(rogue.recv, 65536):
                    pass
            async with tiny_context(engine) as context:
                request = context.maker.request(PROMPT, greedy(2))
                async with Answers(context, [request]) as answers:
                    assert (await answers.whole())[0].num_generated_tokens == 2
        finally:
            engine.close()

    asyncio.run(main())


def test_an_engine_that_nobody_asks_for_long_is_still_there():
    """It is asked for its heartbeat alone, more often than Python would recurse."""
    engine = tiny_engine()
    try:
        for _ in range(3 * sys.getrecursionlimit()):
            done = threading.Event()
            engine.engine.call(lambda core, done=done: done.set())
            assert done.wait(TIMEOUT_S)
    finally:
        engine.close()
