"""What several tests of the chat start from."""

from collections.abc import Iterator

import pytest

from tests.chat.terminal import Terminal, fake_chat


@pytest.fixture
def chat() -> Iterator[Terminal]:
    terminal = fake_chat()
    yield terminal
    terminal.close()
