"""Text of one answer as its ids arrive: whole characters only, and nothing that may still become a stop string.

The cost of a token depends on its own length, not on the answer's. Does not know GPUs, requests or the scheduler.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What is needed of a tokenizer (`lmtool.tokenizer.Tokenizer` has it)."""

    @property
    def strips_leading_space(self) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...


class Detokenizer:
    """Without stop strings, all `push` results and `flush` together are `tokenizer.decode` of all ids.

    stop          texts, none empty; where one is complete first, the answer ends before it (of two that are complete
                  at the same character, the longer one)
    skip_special  leave out special tokens, as `decode` does
    continues     other text stands before it: a space at its beginning belongs to it
    stopped       True once a stop string was found; later ids have no text
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        stop: tuple[str, ...] = (),
        skip_special: bool = True,
        *,
        continues: bool = False,
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = tokenizer.strips_leading_space and not continues
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # decoded, and the beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """The text that is now certain. '' while a character or a possible stop string is incomplete."""
        data = b"".join(
            self._tokenizer.token_bytes(token_id)
            for token_id in ids
            if not (self._skip_special and self._tokenizer.is_special(token_id))
        )
        if data and self._strip_next:
            data = data.removeprefix(b" ")
            self._strip_next = False
        return self._release(self._utf8.decode(data))

    def flush(self) -> str:
        """What was held back, at the end of the answer; half a character becomes U+FFFD. May still set `stopped`."""
        text = self._release(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        if not self._stops:  # nearly always, and asked for each token
            return new
        if self.stopped:
            return ""
        text = self._held + new
        for i, letter in enumerate(new, start=len(self._held)):
            complete = [len(stop.text) for stop in self._stops if stop.advance(letter)]
            if complete:
                self.stopped = True
                self._held = ""
                return text[: i + 1 - max(complete)]
        num_held = max((stop.num_matched for stop in self._stops), default=0)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]


class _StopString:
    """Knuth, Morris and Pratt's search, one letter at a time: a step costs the same however long the string is.

    num_matched  how many letters of `text` the answer now ends with
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._shorter = [0]  # for each prefix: the longest shorter prefix that it ends with
        for letter in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != letter:
                length = self._shorter[length - 1]
            self._shorter.append(length + (text[length] == letter))

    def advance(self, letter: str) -> bool:
        """True when the string is now complete. Not to be called again after that."""
        while self.num_matched and self.text[self.num_matched] != letter:
            self.num_matched = self._shorter[self.num_matched - 1]
        self.num_matched += self.text[self.num_matched] == letter
        return self.num_matched == len(self.text)
