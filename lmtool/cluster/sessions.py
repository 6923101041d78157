"""Which replica remembers a conversation. Plain data; knows no HTTP.

Of a response its id says it. A session has the name that its client chose, a ``session_id``: so the front remembers it.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

_MOST = 100_000  # ten replicas' worth
_OK = 200


@dataclass(slots=True, eq=False)
class Place:
    """Of a conversation. replica: its name; None where there is none yet, or it has ended."""

    replica: str | None = None


@dataclass(slots=True)
class Turn:
    """A request that belongs to the conversation at a place, or begins it there. ends: it is the last one."""

    place: Place = field(default_factory=Place)
    ends: bool = False
    _is_first: bool = False

    @property
    def only(self) -> str | None:
        """The one replica that can answer."""
        return None if self._is_first else self.place.replica

    def go_to(self, replica: str) -> None:
        """It is asked now: whoever comes meanwhile, such as one who cancels, is to find it. May be called again."""
        if self.only is None:
            self._is_first = True
            self.place.replica = replica

    def answered(self, status: int) -> None:
        """What began with an error was not remembered."""
        if self.ends if status == _OK else self._is_first:
            self.place.replica = None


class Sessions:
    """Bounded: the place that nobody asked for longest is forgotten first, as replicas do with conversations. Then, and
    when the front is another one, a session begins anew."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._places: OrderedDict[tuple[str, str, int], Place] = OrderedDict()

    def place(self, owner: str, model: str, session_id: int) -> Place:
        """Of this owner's conversation; changed by its turns."""
        key = owner, model, session_id
        place = self._places.setdefault(key, Place())
        self._places.move_to_end(key)
        if len(self._places) > self._most:
            self._places.popitem(last=False)
        return place
