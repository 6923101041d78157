"""A conversation that is remembered with the token ids it was computed with, so that its next turn computes only what
is new. Knows neither HTTP nor where it is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lmtool.engine.response import Response
from lmtool.images.prepared import PreparedImage
from lmtool.tokenizer import Tokenizer

Message = dict[str, Any]


class Dialogue(msgspec.Struct, frozen=True, array_like=True):
    """messages: as the chat template takes them, the last one an answer; ids: of all of it, as the engine computed it,
    [] where its texts do not say the same (an answer that a stop text cut, or one with a thought or calls). images: of
    the messages, in their order; each is an `IMAGE_ID` among the ids."""

    messages: list[Message]
    ids: list[int] = []
    images: list[PreparedImage] = []

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        prompt_ids: Sequence[int],
        said: Message,
        made: Response,
        tokenizer: Tokenizer,
        images: Sequence[PreparedImage] = (),
    ) -> "Dialogue":
        """The conversation with an answer, or as much as was made of one. said: the answer as a message."""
        ids = list(made.token_ids)
        if ids and ids[-1] in tokenizer.eos_ids:
            ids.pop()
        same = tokenizer.decode(ids) == said["content"] and "tool_calls" not in said
        return cls([*messages, said], [*prompt_ids, *ids] if same else [], list(images))

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Dialogue":
        return msgspec.msgpack.decode(data, type=cls)


def next_ids(past: Dialogue | None, new: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of the whole conversation as the prompt of an answer, beginning with the past's own wherever the template
    leaves them as they are: a text may be written in other tokens than those it was generated with, and those in the
    cache are the latter. Raises TokenizerError where the template refuses.
    """
    if past is None:
        return tokenizer.chat_ids(new)
    spliced = _spliced(past, new, tokenizer) if past.ids else None
    return spliced if spliced is not None else tokenizer.chat_ids([*past.messages, *new])


def _spliced(past: Dialogue, new: Sequence[Message], tokenizer: Tokenizer) -> list[int] | None:
    """Past and what the template writes behind its last answer; None where it changes what was there."""
    asked, answer = past.messages[:-1], past.messages[-1]
    unsaid = [*asked, _silent(answer), *new]
    before, after = tokenizer.render_chat(asked), tokenizer.render_chat(unsaid)
    whole = tokenizer.render_chat([*past.messages, *new])
    if not after.startswith(before) or whole != before + answer["content"] + after[len(before) :]:
        return None
    ids_before, ids_after = tokenizer.chat_ids(asked), tokenizer.chat_ids(unsaid)
    if ids_after[: len(ids_before)] != ids_before:
        return None
    return [*past.ids, *ids_after[len(ids_before) :]]


def _silent(answer: Mapping[str, Any]) -> Message:
    return {**answer, "content": ""}
