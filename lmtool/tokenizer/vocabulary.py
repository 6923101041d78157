"""What each id stands for, in bytes, whatever library made the ids.

Decoding is the same everywhere: the bytes of the ids one after the other, read as UTF-8. So a piece of an answer
can be decoded without the rest of it. Does not know how text is cut into tokens.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Protocol


class Vocabulary(Protocol):
    """Ids, and text to ids without anything added around it.

    size                  number of ids
    special               ids that `skip_special` hides
    strips_leading_space  the space that encoding put before the text is taken off again
    """

    size: int
    special: frozenset[int]
    strips_leading_space: bool

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes:
        """b'' for an id that the model has (padding of its matrix) and the vocabulary does not."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of exactly this token."""
        ...


@cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level(token: str) -> bytes:
    """'Ġthe' -> b' the'. A token with a letter outside the alphabet is its own text."""
    letters = _byte_of_letter()
    try:
        return bytes(letters[letter] for letter in token)
    except KeyError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """'▁the' -> b' the', '<0x0A>' -> b'\\n'."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes((int(token[3:5], 16),))
    return token.replace("▁", " ").encode()


def split_special(
    text: str,
    special: dict[str, int],
    encode: Callable[[str], list[int]],
    encode_within: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """Ids of a text whose special tokens are looked up and whose stretches between them are encoded.

    encode_within: of the stretches behind a special token; None: as the first one.
    """
    if not special:
        return encode(text)
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids: list[int] = []
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(special[part])
        elif part:
            ids += (encode_within or encode)(part) if i else encode(part)
    return ids
