"""What a server remembers: conversations, in one SQLite file for all its HTTP processes, and who is having one now.

Bounded in number and bytes: what was not used for longest goes first. Everything belongs to an owner (an API key's
hash, or '' where none is asked for) and is found by that one only. Knows neither HTTP nor tokens.
"""

import asyncio
import contextlib
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from lmtool.errors import LmtoolError
from lmtool.server.errors import Refusal

_log = logging.getLogger(__name__)
MAX_BYTES = 256 << 20
_BUSY_S = 10.0  # how long another process may write before that is an error
_LEASE_S = 10.0  # a turn whose process does not renew it is over
_TICK_S = 0.1  # how often a process renews its turns and looks whether they are to end

_TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS conversations (
    owner TEXT, name TEXT, content BLOB, num_bytes INTEGER, used INTEGER, PRIMARY KEY (owner, name)
);
CREATE INDEX IF NOT EXISTS oldest ON conversations (used, num_bytes);
CREATE TABLE IF NOT EXISTS turns (
    owner TEXT, name TEXT, turn TEXT, lease_s REAL, cancelled INTEGER DEFAULT 0, PRIMARY KEY (owner, name)
);
"""


class Turn:
    """A turn under way. on_cancel: what ends it; called on the event loop, once, also where it is set too late."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.cancelled = False
        self._on_cancel: Callable[[], None] | None = None

    def on_cancel(self, end: Callable[[], None]) -> None:
        self._on_cancel = end
        if self.cancelled:
            end()

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            if self._on_cancel is not None:
                self._on_cancel()


class SessionStore:
    """path None: in memory, for a server of one process. Its methods wait for the disk on another thread."""

    def __init__(self, path: Path | None = None, *, max_sessions: int = 10_000, max_bytes: int = MAX_BYTES) -> None:
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            path or ":memory:", timeout=_BUSY_S, check_same_thread=False, isolation_level=None
        )
        self._database.executescript(_TABLES)
        self._turns: dict[str, Turn] = {}
        self._ticking: asyncio.Task[None] | None = None

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # ------------------------------------------------------------------ conversations
    async def get(self, owner: str, name: str) -> bytes | None:
        """What was put there last, if it is still remembered."""

        def look() -> bytes | None:
            with self._changing() as database:
                key = owner, name
                database.execute("UPDATE conversations SET used = ? WHERE owner = ? AND name = ?", (_now(), *key))
                query = "SELECT content FROM conversations WHERE owner = ? AND name = ?"
                row = database.execute(query, key).fetchone()
            return None if row is None else row[0]

        return await asyncio.to_thread(look)

    async def put(self, owner: str, name: str, content: bytes) -> None:
        """Remember this instead of what was there. Others are forgotten to make room, the least recent first."""

        def write() -> None:
            with self._changing() as database:
                row = owner, name, content, len(content), _now()
                database.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?)", row)
                self._make_room(database)

        await asyncio.to_thread(write)

    async def delete(self, owner: str, name: str) -> bool:
        """Whether it was there."""

        def write() -> bool:
            with self._changing() as database:
                found = database.execute("DELETE FROM conversations WHERE owner = ? AND name = ?", (owner, name))
                return found.rowcount > 0

        return await asyncio.to_thread(write)

    def _make_room(self, database: sqlite3.Connection) -> None:
        number, num_bytes = database.execute("SELECT COUNT(*), SUM(num_bytes) FROM conversations").fetchone()
        while number > self._max_sessions or num_bytes > self._max_bytes:
            oldest = "SELECT rowid, num_bytes FROM conversations ORDER BY used LIMIT 1"
            row_id, freed = database.execute(oldest).fetchone()
            database.execute("DELETE FROM conversations WHERE rowid = ?", (row_id,))
            number, num_bytes = number - 1, num_bytes - freed

    # ------------------------------------------------------------------ turns
    @property
    def num_turns(self) -> int:
        """Under way in this process."""
        return len(self._turns)

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, name: str) -> AsyncIterator[Turn]:
        """The conversation is this block's alone. Raises Refusal (409) while another one has it, in any process."""
        turn = Turn()
        await asyncio.to_thread(self._begin, owner, name, turn)
        self._turns[turn.id] = turn
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
        try:
            yield turn
        finally:
            try:
                await asyncio.to_thread(self._execute, "DELETE FROM turns WHERE turn = ?", turn.id)
            finally:
                del self._turns[turn.id]

    async def cancel(self, owner: str, name: str) -> bool:
        """End the turn under way, in whatever process; False where there is none."""
        return await asyncio.to_thread(
            self._execute, "UPDATE turns SET cancelled = 1 WHERE owner = ? AND name = ?", owner, name
        )

    def _begin(self, owner: str, name: str, turn: Turn) -> None:
        with self._changing() as database:
            now_s = time.monotonic()  # one clock for all processes of a machine
            database.execute("DELETE FROM turns WHERE lease_s < ?", (now_s,))
            try:
                row = owner, name, turn.id, now_s + _LEASE_S
                database.execute("INSERT INTO turns (owner, name, turn, lease_s) VALUES (?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise Refusal(
                    409, "this session has a turn under way", "wait for it, or cancel it", code="session_busy"
                ) from None

    async def _tick(self) -> None:
        """Keep this process's turns, and end those that are to end, as long as there are any."""
        try:
            while self._turns:
                await asyncio.sleep(_TICK_S)
                for turn_id in await asyncio.to_thread(self._renew, list(self._turns)):
                    turn = self._turns.get(turn_id)
                    if turn is not None:
                        turn.cancel()
        except LmtoolError as error:  # the next turn tries again
            _log.error("%s", error)
        finally:
            self._ticking = None

    def _renew(self, turn_ids: list[str]) -> list[str]:
        """Those of them that are to end."""
        lease_s = time.monotonic() + _LEASE_S
        with self._changing() as database:
            rows = [(lease_s, turn_id) for turn_id in turn_ids]
            database.executemany("UPDATE turns SET lease_s = ? WHERE turn = ?", rows)
            return [row[0] for row in database.execute("SELECT turn FROM turns WHERE cancelled")]

    # ------------------------------------------------------------------ the file
    def _execute(self, statement: str, *values: Any) -> bool:
        with self._changing() as database:
            return database.execute(statement, values).rowcount > 0

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, whole or not at all."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                except BaseException:
                    self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
            except sqlite3.OperationalError as error:  # a full disk
                raise LmtoolError(f"the server cannot remember sessions: {error}", "see its disk") from error


def _now() -> int:
    return time.monotonic_ns()
