"""The chat's page in a process of its own with the scripted model of `fake_chat`; says its address on stderr."""

import os
import socket
import sys
import threading

from lmtool.config import GenerationConfig
from tests.chat.fake_chat import FakeBackend

if __name__ == "__main__":
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from lmtool.chat.web import Page, launch

    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    page = Page(FakeBackend(1000), GenerationConfig(temperature=0.5), users=4)
    print(f"the page is at {launch(page, '127.0.0.1', port)}", file=sys.stderr, flush=True)
    threading.Event().wait()
