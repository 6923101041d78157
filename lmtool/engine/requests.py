"""The one place where token ids and a `GenerationConfig` become a `Request`: everything about them is checked here.

For `Pipeline` and for a server's HTTP process, which has the tokenizer but neither torch nor the engine.
"""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from lmtool.config import GenerationConfig
from lmtool.engine.detokenizer import Detokenizer
from lmtool.engine.grammar_source import grammar_source
from lmtool.engine.sequence import PlacedImage, Request
from lmtool.errors import RequestError
from lmtool.images.prepared import IMAGE_ID, PreparedImage
from lmtool.tokenizer import Tokenizer

_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def default_generation(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of a checkpoint's generation_config.json, under `GenerationConfig`'s names."""
    found = {name: stored[name] for name in _DEFAULTS if isinstance(stored.get(name), int | float)}
    if stored.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


class RequestMaker:
    """Makes the requests of one engine, with ids of their own. Thread-safe.

    session_len: the longest prompt + answer, tokens. vocab_size: of the model; ids must lie below it. first_id: where
    several make requests of one engine, far enough from the others'.
    """

    def __init__(self, tokenizer: Tokenizer, *, session_len: int, vocab_size: int, first_id: int = 0) -> None:
        self.tokenizer = tokenizer
        self.session_len = session_len
        self.vocab_size = vocab_size
        self._ids = itertools.count(first_id)

    def request(
        self, prompt_ids: Sequence[int], config: GenerationConfig, images: Sequence[PreparedImage] = ()
    ) -> Request:
        """prompt_ids: with an `IMAGE_ID` for each of ``images``, in their order.

        Raises RequestError where the prompt does not fit the context or an id is not in the vocabulary.
        """
        if not prompt_ids:
            raise RequestError("the prompt is empty", "give at least one token")
        text_ids = [i for i in prompt_ids if i != IMAGE_ID] if images else prompt_ids
        prompt_ids, placed = place_images(prompt_ids, images)
        if len(prompt_ids) >= self.session_len:
            of_images = f", {len(prompt_ids) - len(text_ids)} of them of pictures," if images else ","
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens{of_images} the context holds {self.session_len} with "
                "the answer",
                "shorten it or raise --session-len",
            )
        if placed and config.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: a picture's rows are no tokens", "leave out one of them")
        for what, ids in (
            ("prompt", text_ids),
            ("--logit-bias", config.logit_bias),
            ("--stop-token-ids", config.stop_token_ids),
        ):
            outside = [i for i in ids if not 0 <= i < self.vocab_size]
            if outside:
                raise RequestError(f"{what}: token id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        if config.response_format is not None:
            grammar_source(config.response_format)  # what is wrong with its form is said now
        stop_ids = frozenset(config.stop_token_ids) | (frozenset() if config.ignore_eos else self.tokenizer.eos_ids)
        return Request(
            request_id=next(self._ids),
            prompt_ids=tuple(prompt_ids),
            params=config,
            stop_ids=stop_ids,
            seed=config.seed if config.seed is not None else secrets.randbits(63),
            bad_ids=self._bad_ids(config.bad_words),
            images=placed,
        )

    def detokenizer(self, config: GenerationConfig, *, continues: bool = False) -> Detokenizer:
        """Of one answer. continues: it goes on with its prompt's text."""
        return Detokenizer(self.tokenizer, config.stop, config.skip_special_tokens, continues=continues)

    def _bad_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands at a beginning and after a space: a tokenizer writes the two differently."""
        spellings = [spelling for word in words for spelling in (word, " " + word.lstrip())]
        encoded = (tuple(self.tokenizer.encode(text, add_special=False)) for text in spellings)
        return tuple(dict.fromkeys(ids for ids in encoded if ids))


def place_images(
    prompt_ids: Sequence[int], images: Sequence[PreparedImage]
) -> tuple[Sequence[int], tuple[PlacedImage, ...]]:
    """Every `IMAGE_ID` gives way to the rows of the picture that it stands for."""
    if not images:
        return prompt_ids, ()
    if prompt_ids.count(IMAGE_ID) != len(images):
        raise RequestError(
            f"{len(images)} pictures, and the chat template has places for {prompt_ids.count(IMAGE_ID)}",
            "give another template with --chat-template NAME|FILE",
        )
    ids: list[int] = []
    placed: list[PlacedImage] = []
    for token_id in prompt_ids:
        if token_id == IMAGE_ID:
            image = images[len(placed)]
            placed.append(PlacedImage(len(ids), image))
            ids += image.row_ids()
        else:
            ids.append(token_id)
    return ids, tuple(placed)
