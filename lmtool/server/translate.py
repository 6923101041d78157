"""The body of a request → what the engine is asked: `GenerationConfig`, token ids, `Request`s.

All that is wrong with it is refused here, under the names that it has in the body.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lmtool.config import GenerationConfig
from lmtool.engine.sequence import Request
from lmtool.errors import RequestError
from lmtool.images.prepared import IMAGE_ID, PreparedImage, count_tokens
from lmtool.server.context import ServerContext
from lmtool.server.errors import Refusal
from lmtool.server.protocol import Generation

_THREAD_CHARS = 20_000  # reading this much text into tokens takes milliseconds: others should not wait for it
_FIELDS = {  # of `GenerationConfig`, where the body says it otherwise
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "logprobs": "top_logprobs",
    "prompt_logprobs": "logprobs",
}
T = TypeVar("T")


def check_model(context: ServerContext, name: str | None) -> None:
    """None: the one there is. Raises Refusal 404 for another."""
    if name is not None and name not in context.config.model_names:
        served = ", ".join(context.config.model_names)
        raise Refusal(
            404, f"there is no model {name[:200]!r}", f"here is {served}", param="model", code="model_not_found"
        )


def check_stream(body: Generation) -> None:
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options is for streams", "leave it out or give stream: true", param="stream_options")


def generation(context: ServerContext, body: Generation, **given: Any) -> GenerationConfig:
    """given: what chat and completions call differently. Raises Refusal for what cannot be."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    _check_bounds(context, body, stop)
    settings: dict[str, Any] = {"temperature": 1.0, **context.default_generation()}
    same = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "ignore_eos",
        "skip_special_tokens",
    )
    settings |= {name: value for name in same if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        settings["top_k"] = max(body.top_k, 0)
    if body.min_tokens is not None:
        settings["min_new_tokens"] = body.min_tokens
    settings |= {
        "stop": tuple(stop),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "bad_words": tuple(body.bad_words or ()),
        "logit_bias": _logit_bias(body),
    }
    return named(lambda: GenerationConfig(**settings, **given))


def _check_bounds(context: ServerContext, body: Generation, stop: Sequence[str]) -> None:
    config = context.config

    def check(ok: bool, param: str, said: str, wanted: str) -> None:
        if not ok:
            raise Refusal(400, said, f"give {wanted}", param=param)

    check((body.n or 1) <= config.max_n, "n", f"n is {body.n}", f"at most {config.max_n}")
    check(len(stop) <= config.max_stop, "stop", f"stop has {len(stop)} texts", f"at most {config.max_stop}")
    check(all(stop), "stop", "stop has an empty text", "texts that are not empty")
    longest = max(map(len, stop), default=0)
    most = config.max_stop_chars
    check(longest <= most, "stop", f"a stop text has {longest} characters", f"at most {most}")


def _logit_bias(body: Generation) -> dict[int, float]:
    given = body.logit_bias or {}
    if not all(re.fullmatch(r"[0-9]{1,10}", key) for key in given):
        raise Refusal(400, "logit_bias has a key that is no token id", "give numbers", param="logit_bias")
    return {int(key): float(bias) for key, bias in given.items()}


def named(make: Callable[[], T]) -> T:
    """What is made; an error speaks of the body's fields instead of a command line's flags."""
    try:
        return make()
    except RequestError as error:
        found = re.search(r"--([a-z][a-z-]*)", error.cause) or re.match(r"([a-z_]+): ", error.cause)
        param = _field(found[1]) if found else None
        raise Refusal(400, _as_fields(error.cause), error.fix and _as_fields(error.fix), param=param) from error


def _field(flag: str) -> str:
    name = flag.replace("-", "_")
    return _FIELDS.get(name, name)


def _as_fields(text: str) -> str:
    return re.sub(r"--([a-z][a-z-]*)", lambda found: _field(found[1]), text)


async def off_the_loop(num_chars: int, make: Callable[[], T]) -> T:
    """Made at once, or on another thread where that would keep everybody else waiting."""
    return make() if num_chars < _THREAD_CHARS else await asyncio.to_thread(make)


def requests(
    context: ServerContext,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    num_choices: int,
    param: str,
    images: Sequence[PreparedImage] = (),
) -> list[Request]:
    """The choices of each prompt, one prompt after the other. images: of the only prompt there is then. Raises Refusal
    for a prompt that does not fit."""
    maker = context.maker
    if len(prompts) * num_choices > context.config.max_prompts:
        raise Refusal(
            400,
            f"{len(prompts)} prompts with {num_choices} choices are too many at once",
            f"give at most {context.config.max_prompts} in all",
            param=param,
        )
    made: list[Request] = []
    for ids in prompts:
        _check_prompt(ids, maker.session_len, maker.vocab_size, param, images)
        first = named(lambda ids=ids: maker.request(ids, config, images))  # type: ignore[misc]
        made.append(first)
        made += [
            replace(maker.request(ids, _with_seed(config, i), images), after=first.request_id)
            for i in range(1, num_choices)
        ]
    return made


def _check_prompt(
    ids: Sequence[int], session_len: int, vocab_size: int, param: str, images: Sequence[PreparedImage]
) -> None:
    if not ids:
        raise Refusal(400, "the prompt is empty", "give at least one token", param=param)
    check_places(ids, images, param)
    number = count_tokens(ids, images)
    if number >= session_len:
        rows = sum(image.num_tokens for image in images)
        of_images = f", {rows} of them of {len(images)} pictures," if images else ","
        raise Refusal(
            400,
            f"the prompt has {number} tokens{of_images} the context holds {session_len} with the answer",
            "shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if max(ids) >= vocab_size:
        raise Refusal(400, f"{param}: token id {max(ids)} is outside the vocabulary of {vocab_size}", param=param)


def check_places(ids: Sequence[int], images: Sequence[PreparedImage], param: str) -> None:
    """Raises Refusal where the chat template has left out a picture."""
    places = ids.count(IMAGE_ID)
    if places != len(images):
        cause = f"there are {len(images)} pictures, and this model's chat template has places for {places}"
        raise Refusal(400, cause, "put them into messages of the user", param=param)


def _with_seed(config: GenerationConfig, choice: int) -> GenerationConfig:
    """Choices with one seed would all be the same."""
    return config if config.seed is None else replace(config, seed=(config.seed + choice) % 2**63)
