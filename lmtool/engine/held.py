"""Requests that are not with the scheduler yet: what they wait for has not come. Ids only.

They come after another one, or what their grammar allows at first is not known, or both.
"""

from lmtool.engine.sequence import Sequence


class Held:
    """In the order in which they came."""

    def __init__(self) -> None:
        self._after: dict[int, list[Sequence]] = {}  # by the id of the one they come after
        self._leader_of: dict[Sequence, int | None] = {}

    def __bool__(self) -> bool:
        return bool(self._leader_of)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._leader_of

    def add(self, sequence: Sequence, leader_id: int | None) -> None:
        """leader_id: whom it comes after; None: it waits for its grammar alone."""
        self._leader_of[sequence] = leader_id
        if leader_id is not None:
            self._after.setdefault(leader_id, []).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It will not start."""
        leader_id = self._leader_of.pop(sequence)
        if leader_id is not None:
            self._after[leader_id].remove(sequence)

    def release(self, leader_id: int) -> list[Sequence]:
        """Nobody has to wait for this one any more. Returns who may start."""
        sequences = self._after.pop(leader_id, [])
        for sequence in sequences:
            self._leader_of[sequence] = None
        return self.let_go(sequences)

    def let_go(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those of them who wait for nothing any more."""
        free = [s for s in sequences if not s.waits_for_its_grammar and self._leader_of.get(s, 0) is None]
        for sequence in free:
            del self._leader_of[sequence]
        return free
