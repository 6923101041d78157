"""`Tokenizer`: one face over a vocabulary, its end-of-answer ids and a chat template.

Knows neither files nor the libraries behind the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmtool.errors import RequestError, TokenizerError
from lmtool.images.prepared import IMAGE_ID
from lmtool.tokenizer.chat_template import BUILT_IN, ChatTemplate
from lmtool.tokenizer.fence import Fence
from lmtool.tokenizer.parts import as_parts, as_text, check_content, has_pictures
from lmtool.tokenizer.vocabulary import Vocabulary

NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Text to ids and back. Immutable; may be shared between threads.

    bos_id      None where the model knows none
    eos_ids     ids that end an answer: of the configuration files, and the chat template's end of turn
    prefix_ids, suffix_ids   what `add_special` puts around a text
    tokens      texts of bos_token, eos_token, … for the chat template
    template    None for a base model
    image_token what stands for a picture in the template's prompts, '<image>'; None for a model without pictures. The
                vocabulary may have it (llava-hf) or not (LLaVA's own checkpoints)
    source      the checkpoint, for messages to the user
    """

    vocabulary: Vocabulary
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict)
    template: ChatTemplate | None = None
    image_token: str | None = None
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
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary and pictures have no text."""
        hidden = self.vocabulary.special if skip_special else frozenset()
        data = b"".join(self.vocabulary.token_bytes(i) for i in ids if i >= 0 and i not in hidden)
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
        """The prompt text of a conversation. A message's content is a text, or a list of parts: {"type": "text",
        "text": …} and {"type": "image"}, whose places in the prompt `image_token` takes.

        Raises TokenizerError without a template or where the template refuses, RequestError for malformed messages
        and for pictures that the model does not take.
        """
        if self.template is None:
            raise TokenizerError(
                f"{self.source} has no chat template: it is a base model, or its template was left out",
                f"give one with --chat-template NAME|FILE ({', '.join(BUILT_IN)})",
            )
        _check_messages(messages)
        return self.template.render(self._as_it_takes(messages), add_generation_prompt, self.tokens, options)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Ids of the prompt, with `IMAGE_ID` for each picture. Only the template makes special tokens and places of
        pictures: '<|im_end|>' or '<image>' inside a message or an option, such as a tool's description, stays text.

        The template is the whole prompt, so no BOS is added to the one it writes. Raises what `render_chat` does.
        """
        names = {self.vocabulary.token_bytes(i).decode("utf-8", "replace") for i in self.vocabulary.special}
        names |= {self.image_token or ""}
        fence = Fence(names - {""}, messages, options)
        prompt = self.render_chat(
            [fence.around(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            options=fence.around(options),
        )
        ids: list[int] = []
        for piece, is_template in fence.cut(prompt):
            ids += self._template_ids(piece) if is_template else self._plain_ids(piece)
        if self.image_token is not None and tuple(ids[: len(self.prefix_ids)]) != self.prefix_ids:
            ids = [*self.prefix_ids, *ids]  # llava-hf's templates leave BOS to the tokenizer
        return ids

    def _as_it_takes(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Contents in the form that the template takes."""
        contents = [message.get("content") for message in messages]
        for i, content in enumerate(contents):
            check_content(i, content)
            if self.image_token is None and has_pictures(content):
                raise RequestError(f"{self.source} takes no pictures", "load a model that does, such as LLaVA")
        if self.image_token is None and not any(isinstance(content, list | tuple) for content in contents):
            return messages
        assert self.template is not None
        if self.image_token is not None and self.template.takes_parts(self.tokens, self.image_token):
            formed = [as_parts(content) for content in contents]
        else:
            formed = [as_text(content, self.image_token or "") for content in contents]
        return [
            {**message, "content": content} if "content" in message else message
            for message, content in zip(messages, formed, strict=True)
        ]

    def _template_ids(self, text: str) -> list[int]:
        """Ids of what the template wrote. A vocabulary without the picture's token never saw it: the text is cut there
        and each piece stands for itself, as in LLaVA's own `tokenizer_image_token`."""
        if self.image_token is None:
            return self.encode(text, add_special=False, parse_special=True)
        token_id = self.vocabulary.token_id(self.image_token)
        pieces = [text] if token_id is not None else text.split(self.image_token)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += [IMAGE_ID] if i else []
            found = self.encode(piece, add_special=False, parse_special=True)
            ids += [IMAGE_ID if i == token_id else i for i in found]
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of a name that somebody said."""
        ids = self.encode(text, add_special=False)
        if text == self.image_token and self.vocabulary.token_id(text) in ids:
            # the library makes a token that was added as an ordinary one wherever its whole name stands
            return [*self.encode(text[:1], add_special=False), *self.encode(text[1:], add_special=False)]
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
