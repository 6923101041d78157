"""`Constraint`: how far one answer is in the grammar that it follows. Knows neither grammars nor processes."""

from dataclasses import dataclass, field
from typing import Protocol

from lmtool.engine.grammar_source import GrammarSource
from lmtool.errors import LmtoolError


class Follower(Protocol):
    """Whoever works out what may come next."""

    def step(self, constraint: "Constraint", token_id: int) -> None:
        """The answer got this token. What may follow comes later, in ``allowed``; or ``error`` does."""
        ...


@dataclass(slots=True, eq=False)
class Constraint:
    """allowed: a bit for each id that may come next, in 32-bit words; None: this is being worked out.

    only_ends  none of them but those that end an answer
    stop_ids   these
    error      why the answer cannot go on
    number     what the follower calls it
    """

    source: GrammarSource | None = None
    allowed: bytes | None = None
    only_ends: bool = False
    stop_ids: frozenset[int] = frozenset()
    error: LmtoolError | None = None
    number: int = -1
    follower: Follower | None = field(default=None, repr=False)

    def allows(self, token_id: int) -> bool:
        """Of the token that came out of a step in which ``allowed`` was known."""
        words = self.allowed or b""
        return 0 <= token_id < 8 * len(words) and bool(words[token_id // 8] >> token_id % 8 & 1)

    def advance(self, token_id: int) -> None:
        self.allowed = None
        if self.follower is not None:
            self.follower.step(self, token_id)
