"""A replica's api_server: `python -m lmtool.cluster.replica_process`, started by `replica` with its orders on stdin.

Its first line on stdout says where it listens, or why it cannot start. SIGTERM lets answers finish. When stdin ends,
its actor is gone, and it ends at once: Ray may already be starting another on the same GPU.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec

from lmtool import log
from lmtool.checkpoint.hub import resolve_model
from lmtool.cluster.orders import FailedStart, ReplicaOrders, ReplicaSays
from lmtool.errors import LmtoolError
from lmtool.server.doors import address_of, bind
from lmtool.server.supervisor import Launch, serve_at

_INSIST_S = 0.2


def main() -> int:
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=ReplicaOrders)
    log.setup()
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed, here or by children
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        try:
            _serve(orders, out)
        except LmtoolError as error:
            _tell(out, ReplicaSays(failure=FailedStart.of(orders.config.model_names[0], error)))
            return error.exit_code
    return 0


def _serve(orders: ReplicaOrders, out: IO[bytes]) -> None:
    folder = Path(orders.download_dir) if orders.download_dir is not None else None
    path = resolve_model(orders.model, revision=orders.revision, download_dir=folder)
    doors = bind(orders.config)
    _tell(out, ReplicaSays(url=address_of(orders.config, doors[0])))
    launch = Launch(
        name=orders.model, path=path, chat_template=orders.chat_template, engine=orders.engine, config=orders.config
    )
    serve_at(doors, launch, lambda _: None)


def _tell(out: IO[bytes], said: ReplicaSays) -> None:
    out.write(msgspec.json.encode(said) + b"\n")
    out.flush()


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not through sys.stdin: its lock would be held when the interpreter ends
        pass
    while True:  # the second signal ends at once what the first one lets finish
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_INSIST_S)


if __name__ == "__main__":
    sys.exit(main())
