"""What several tests of the chat start from."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chat.browser import chromium
from tests.chat.terminal import Terminal, fake_chat


@pytest.fixture
def chat() -> Iterator[Terminal]:
    terminal = fake_chat()
    yield terminal
    terminal.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one file's tests: while it is there, this thread has a running event loop."""
    with chromium() as running:
        yield running
