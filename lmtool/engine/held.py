"""Requests that are not with the scheduler yet: what they wait for has not come. Ids only."""

from lmtool.engine.sequence import Sequence


class Held:
    """By the id of the request they come after, in their order."""

    def __init__(self) -> None:
        self._after: dict[int, list[Sequence]] = {}
        self._leader_of: dict[Sequence, int] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._leader_of

    def add(self, sequence: Sequence, leader_id: int) -> None:
        self._after.setdefault(leader_id, []).append(sequence)
        self._leader_of[sequence] = leader_id

    def remove(self, sequence: Sequence) -> None:
        """It will not start."""
        leader_id = self._leader_of.pop(sequence)
        self._after[leader_id].remove(sequence)

    def release(self, leader_id: int) -> list[Sequence]:
        """Who waited for this one alone, and waits no more."""
        sequences = self._after.pop(leader_id, [])
        for sequence in sequences:
            del self._leader_of[sequence]
        return sequences
