"""`Tokenizer`: one face over a vocabulary, its end-of-answer ids and a chat template.

Knows neither files nor the libraries behind the vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmtool.errors import RequestError, TokenizerError
from lmtool.tokenizer.chat_template import BUILT_IN, ChatTemplate
from lmtool.tokenizer.vocabulary import Vocabulary

# Unicode's noncharacters: never part of text, so they can mark a place in it
NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Text to ids and back. Immutable; may be shared between threads.

    bos_id      None where the model knows none
    eos_ids     ids that end an answer: of the configuration files, and the chat template's end of turn
    prefix_ids, suffix_ids   what `add_special` puts around a text
    tokens      texts of bos_token, eos_token, … for the chat template
    template    None for a base model
    source      the checkpoint, for messages to the user
    """

    vocabulary: Vocabulary
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict)
    template: ChatTemplate | None = None
    source: str = "this model"

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def chat_template(self) -> str | None:
        return self.template.source if self.template else None

    @property
    def strips_leading_space(self) -> bool:
        """True: `decode` leaves out one space at the very beginning, which encoding had put there."""
        return self.vocabulary.strips_leading_space

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text. Texts such as '<|im_end|>' become the token of that name only with `parse_special`.

        Raises RequestError for half a surrogate pair: the libraries behind this disagree on what it is.
        """
        _check_unicode(text)
        ids = self.vocabulary.encode(text, parse_special) if text else []
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary have no text."""
        hidden = self.vocabulary.special if skip_special else frozenset()
        data = b"".join(self.vocabulary.token_bytes(i) for i in ids if i not in hidden)
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The token by itself, as logprobs show it; half a character is U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """True for ids that `skip_special` hides."""
        return token_id in self.vocabulary.special

    def token_id(self, text: str) -> int | None:
        """The id of exactly this token, such as '<|im_end|>'."""
        return self.vocabulary.token_id(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> str:
        """The prompt text of a conversation.

        Raises TokenizerError without a template or where the template refuses, RequestError for malformed messages.
        """
        if self.template is None:
            raise TokenizerError(
                f"{self.source} has no chat template: it is a base model, or its template was left out",
                f"give one with --chat-template NAME|FILE ({', '.join(BUILT_IN)})",
            )
        _check_messages(messages)
        return self.template.render(messages, add_generation_prompt, self.tokens, options)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Ids of the prompt. Only the template makes special tokens: '<|im_end|>' inside a message or an option, such
        as a tool's description, stays text.

        The template is the whole prompt, so no BOS is added to the one it writes.
        """
        marks = _unused_marks([*messages, options])
        names = {self.vocabulary.token_bytes(i).decode("utf-8", "replace") for i in self.vocabulary.special}
        fenced = [_fence(message, names - {""}, marks) for message in messages]
        options = _fence(options, names - {""}, marks)
        text = self.render_chat(fenced, add_generation_prompt=add_generation_prompt, options=options)
        ids: list[int] = []
        begin, end = marks
        for i, part in enumerate(re.split(f"{begin}([^{begin}{end}]*){end}", text)):
            # a template that cuts a message in the middle of a fence leaves one mark, and no whole name
            part = part.replace(begin, "").replace(end, "")
            ids += self.encode(part, add_special=False, parse_special=i % 2 == 0)
        return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} of the text is {text[error.start]!r}, half a surrogate pair", "give UTF-8 text"
        ) from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise RequestError("the conversation is empty", "give at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {i} has no role", 'give messages as {"role": "user", "content": "…"}')


def _strings(value: Any) -> list[str]:
    """Every text inside a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _unused_marks(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    used = set().union(*(set(text) for message in messages for text in _strings(message)))
    free = [mark for mark in NONCHARACTERS if mark not in used]
    if len(free) < 2:
        raise RequestError("the messages use every Unicode noncharacter", "take out U+FDD0 to U+FDEF")
    return free[0], free[1]


def _fence(value: Any, names: set[str], marks: tuple[str, str]) -> Any:
    """The same message with each special token's name between two marks, so that it can be told from the template's.

    Only such names are fenced: any other text reaches the tokenizer in one piece, as the model was trained.
    """
    if isinstance(value, str):
        found = [name for name in names if name in value]
        if not found:
            return value
        pattern = "|".join(re.escape(name) for name in sorted(found, key=len, reverse=True))
        return re.sub(pattern, lambda match: marks[0] + match[0] + marks[1], value)
    if isinstance(value, Mapping):
        return {key: _fence(item, names, marks) for key, item in value.items()}
    return [_fence(item, names, marks) for item in value] if isinstance(value, list | tuple) else value
