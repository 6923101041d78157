"""The chat's page in a process of its own with the scripted model of `fake_chat`; says its address on stderr."""

import os
import sys
import threading
from collections.abc import Iterator, Sequence

from lmtool.chat.backend import Delta, Message
from lmtool.config import GenerationConfig
from tests.chat.fake_chat import FakeBackend


class TellingBackend(FakeBackend):
    def stream(self, messages: Sequence[Message], config: GenerationConfig) -> Iterator[Delta]:
        try:
            yield from super().stream(messages, config)
        finally:
            print(f"the answer to {messages[-1]['content']!r} is over", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from lmtool.chat.web import Page, launch

    page = Page(TellingBackend(1000), GenerationConfig(temperature=0.5), users=4)
    print(f"the page is at {launch(page, '127.0.0.1', 0)}", file=sys.stderr, flush=True)
    threading.Event().wait()
