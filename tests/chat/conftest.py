"""What several tests of the chat start from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.chat.browser import chromium
from tests.chat.terminal import Terminal, fake_chat


@pytest.fixture
def start_chat() -> Iterator[Callable[..., Terminal]]:
    """`fake_chat`; whatever it started ends with the test."""
    with ExitStack() as started:
        yield lambda *flags, **settings: started.enter_context(closing(fake_chat(*flags, **settings)))


@pytest.fixture
def chat(start_chat: Callable[..., Terminal]) -> Terminal:
    return start_chat()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one file's tests: while it is there, this thread has a running event loop."""
    with chromium() as running:
        yield running
