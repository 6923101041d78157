"""A server's engine and its context in the test's own process, over the real wire: a tiny random model behind
SmolLM2's tokenizer."""

import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.core import EngineCore, TokenOutput
from lmtool.engine.setup import load_engine
from lmtool.images.form import read_image_form
from lmtool.server.config import ServerConfig
from lmtool.server.context import ServerContext
from lmtool.server.engine_client import EngineClient
from lmtool.server.engine_server import EngineServer
from lmtool.server.wire import EngineInfo
from lmtool.tokenizer import load_tokenizer
from tests.support import TINY, request, tiny_core, tiny_decoder


class EngineInThread:
    """What `engine_process` is, without a process. path: where it listens. folder: the model's, whose tokenizer and
    way with pictures a context of it has; None: SmolLM2's tokenizer."""

    def __init__(self, core: EngineCore, vocab_size: int = 49152, folder: Path | None = None) -> None:
        self.core = core
        self.model_folder = folder
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "engine"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        self._listener = listener
        self.server = EngineServer(listener)
        self.engine = AsyncEngine(core)
        blocks = core.scheduler.blocks
        self.server.serve(
            self.engine,
            EngineInfo(
                description="tiny",
                session_len=core.session_len,
                vocab_size=vocab_size,
                max_batch_size=4,
                num_blocks=blocks.num_blocks,
                block_size=blocks.block_size,
                load_s=0.0,
                generation_defaults={},
            ),
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No step is made meanwhile: what is under way is not over, however late anybody else gets to run."""
        reached, let_go = threading.Event(), threading.Event()

        def hold(core: EngineCore) -> None:
            reached.set()
            let_go.wait()

        self.engine.call(hold)
        try:
            assert reached.wait(120)
            yield
        finally:
            let_go.set()

    def close(self) -> None:
        self.server.close()
        self.engine.close()
        self._listener.close()
        self._folder.cleanup()


def smollm2_tokenizer() -> Any:
    return load_tokenizer(resolve_model("smollm2-135m"))


def tiny_engine(**settings: Any) -> EngineInThread:
    decoder = tiny_decoder(replace(TINY, vocab_size=49152))
    return EngineInThread(tiny_core(decoder, **{"session_len": 512, "num_blocks": 64, **settings}))


@contextlib.asynccontextmanager
async def tiny_context(engine: EngineInThread | None = None, **config: Any) -> AsyncIterator[ServerContext]:
    """A context whose engine is ready. config: of `ServerConfig`."""
    own = engine is None
    engine = engine or tiny_engine()
    client = EngineClient(engine.path)
    client.start()
    try:
        await client.ready()
        folder = engine.model_folder
        tokenizer = load_tokenizer(folder) if folder else smollm2_tokenizer()
        form = read_image_form(folder) if folder else None
        yield ServerContext(ServerConfig(**{"model_names": ("tiny",), **config}), client, tokenizer, form)
    finally:
        await client.close()
        if own:
            engine.close()


def llava_engine(folder: Path, **settings: Any) -> EngineInThread:
    """Of a folder of `tiny_llava`."""
    config = EngineConfig(**{"device": "cpu", "dtype": "float32", "session_len": 1024, "cache_gb": 0.05, **settings})
    loaded = load_engine(folder, config)
    return EngineInThread(loaded.core, loaded.model.vocab_size, folder)


def alone(prompt_ids: Sequence[int], **settings: Any) -> list[TokenOutput]:
    """What the engine of `tiny_engine` itself says to one request, with nobody else there."""
    core = tiny_core(tiny_decoder(replace(TINY, vocab_size=49152)), session_len=512, num_blocks=64)
    core.add(request(0, prompt_ids, **settings))
    outputs: list[TokenOutput] = []
    while core.has_work:
        outputs += core.step()
    core.close()
    return outputs
