"""What an engine and the processes that follow its grammars say to each other, in frames over a Unix socket.

Knows neither xgrammar nor torch.
"""

import msgspec

from lmtool.tokenizer import Tokenizer


class GrammarVocabulary(msgspec.Struct, frozen=True):
    """The text of every id, b'' where a model's matrix is padded, and the ids that end an answer.

    A special token has no text that a grammar could match: a byte that is not UTF-8 comes first. A grammar means it by
    its id.
    """

    tokens: list[bytes]
    stop_ids: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> "GrammarVocabulary":
        """vocab_size: of the model's logits."""
        known = min(tokenizer.vocab_size, vocab_size)
        tokens = [b"\xff" * tokenizer.is_special(i) + tokenizer.token_bytes(i) for i in range(known)]
        stop_ids = sorted(i for i in tokenizer.eos_ids if i < vocab_size)
        return cls(tokens + [b""] * (vocab_size - known), stop_ids)


class Source(msgspec.Struct, tag=True):
    """The first frame to a process: what it is to compile, and the memory that it may take besides what it has."""

    kind: str
    text: str
    closed: bool
    memory_bytes: int


class Open(msgspec.Struct, tag=True):
    """An answer begins."""

    number: int


class Step(msgspec.Struct, tag=True):
    """It got a token."""

    number: int
    token_id: int


class Close(msgspec.Struct, tag=True):
    """It is over. Has no reply; all else has one, in the same order."""

    number: int


class Begun(msgspec.Struct, tag=True):
    """The process is there."""


class Compiled(msgspec.Struct, tag=True):
    pass


class Allowed(msgspec.Struct, tag=True):
    """Which ids may come next: a bit for each, in 32-bit words. only_ends: none but those that end an answer."""

    number: int
    words: bytes
    only_ends: bool


class Refused(msgspec.Struct, tag=True):
    """number: of the answer that cannot go on; None: the grammar as a whole."""

    number: int | None
    cause: str
    fix: str | None


Order = Source | Open | Step | Close
Reply = Begun | Compiled | Allowed | Refused
