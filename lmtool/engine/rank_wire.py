"""What the ranks of an engine say to each other, in frames (`lmtool.engine.frames`)."""

from typing import Any

import msgspec

from lmtool.engine.batch import Batch, Load


class RankOrders(msgspec.Struct, frozen=True):
    """The first line of a rank's stdin.

    card        of the GPUs that its machine has for this engine: 0 is the one that ``device`` names
    num_cards   of its machine for this engine
    store       how the ranks find each other: a file, or address and port of the first rank
    socket_fd   its connection to the first rank; known to whoever starts the process
    engine      what was given of `EngineConfig`
    shape       random weights of this shape (`ModelConfig`'s fields) in place of ``path``'s
    digest      of the model as the first rank has it, where ranks on other machines read copies
    """

    rank: int
    size: int
    card: int
    num_cards: int
    device: str
    engine: dict[str, Any]
    store: str | tuple[str, int]
    socket_fd: int = -1
    path: str | None = None
    digest: str | None = None
    shape: dict[str, Any] | None = None
    group_size: int | None = None
    verbose: bool = False


class Launch(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Step ``number``: the first rank launches it too."""

    number: int
    batch: Batch


class Copy(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Each rank its part of these blocks: (block, host block) that go to the host, loads that come from there."""

    saves: list[tuple[int, int]]
    loads: list[Load]


class Landed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """These loads are over on the first rank: what is launched from now on waits for them."""

    numbers: list[int]


class Present(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The rank is alive; every `silence.PRESENT_S`. number: of the last step that it is done with launching."""

    number: int


class Arrived(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The rank is there, and joins the group next."""


class Ready(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The rank waits for steps."""


class Refused(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """It cannot start, and ends: kind is the name of an error's class."""

    kind: str
    cause: str
    fix: str | None = None


class Failed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Launching step ``number`` raised this."""

    number: int
    cause: str


FromRank = Present | Arrived | Ready | Refused | Failed
ToRank = Launch | Copy | Landed
