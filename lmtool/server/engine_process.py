"""The engine's process: `python -m lmtool.server.engine_process`, started by `supervisor` with its orders on stdin.

It listens from the start on the socket it inherits, says how far loading is, and serves until stdin ends or SIGTERM: an
engine never outlives the server it belongs to. Exit code 2 where what was given cannot be used, 1 where it broke.
"""

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec

from lmtool import log
from lmtool.config import EngineConfig
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.errors import EngineError, LmtoolError
from lmtool.server.engine_server import EngineServer
from lmtool.server.orders import EngineOrders
from lmtool.server.wire import EngineInfo, Failure, Loading, Refused
from lmtool.tokenizer import load_tokenizer

_log = logging.getLogger("lmtool.server.engine_process")  # run as a program, its __name__ is another


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the server decides when we end
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineOrders)
    log.setup()
    if orders.verbose:
        log.be_verbose()
    over, serving = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    threading.Thread(target=_wait_for_end_of_stdin, args=(over, serving), daemon=True).start()
    server = EngineServer(socket.socket(fileno=orders.listener_fd))
    try:
        loaded = load_engine(
            Path(orders.path),
            EngineConfig(**orders.engine),
            lambda what, done, total: server.say(Loading(what, done, total)),
        )
    except LmtoolError as error:
        return _refuse(server, error)
    except Exception as error:  # whatever it was: the server is to say it
        return _refuse(server, EngineError(f"the engine cannot start: {type(error).__name__}: {error}"))
    loaded.core.give_vocabulary(lambda: _vocabulary(orders, loaded))
    engine = AsyncEngine(loaded.core)
    serving.set()
    server.serve(engine, _info(orders.name, loaded))
    threading.Thread(target=_notice, args=(engine, over), daemon=True).start()
    over.wait()
    broken = engine.over.is_set()
    if broken:  # also where nobody had asked for anything, who would be told
        _log.error("%s", engine.broken)
    server.close()
    if broken:  # another one is started; what is on the device may wait for a rank that is gone
        os._exit(1)
    engine.close()
    return 0


def _notice(engine: AsyncEngine, over: threading.Event) -> None:
    engine.over.wait()
    over.set()


def _vocabulary(orders: EngineOrders, loaded: LoadedEngine) -> GrammarVocabulary:
    """Read when a grammar is first asked for."""
    tokenizer = load_tokenizer(Path(orders.path), chat_template=orders.chat_template)
    return GrammarVocabulary.of(tokenizer, loaded.model.vocab_size)


def _wait_for_end_of_stdin(over: threading.Event, serving: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1):  # not through sys.stdin: its lock would be held when the interpreter ends
        pass
    over.set()
    if not serving.is_set():
        os._exit(0)  # loading a model may take a while yet, and nobody waits for it


def _refuse(server: EngineServer, error: LmtoolError) -> int:
    server.say(Refused(Failure.of(error)))
    server.close()
    return error.exit_code


def _info(name: str, loaded: LoadedEngine) -> EngineInfo:
    plan, scheduler = loaded.plan, loaded.core.scheduler
    return EngineInfo(
        description=loaded.described(name),
        session_len=plan.session_len,
        vocab_size=loaded.model.vocab_size,
        max_batch_size=scheduler.max_batch_size,
        num_blocks=scheduler.blocks.num_blocks,
        block_size=scheduler.blocks.block_size,
        load_s=loaded.load_s,
        generation_defaults=dict(loaded.generation_defaults),
    )


if __name__ == "__main__":
    sys.exit(main())
