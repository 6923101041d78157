"""A client that goes away: whatever is being done for it is ended at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive


class ClientGone(Exception):
    """There is nobody to answer any more."""


@contextlib.asynccontextmanager
async def until_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancels what the block waits for as soon as the client has gone; `ClientGone` then comes out of the block.

    For after the body was read: whatever else is received is the end.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
