"""The beginnings of a prompt as hashes, by which `routing` knows what a replica has seen. Text in, numbers out.

What shares tokens at its beginning shares characters there, under any tokenizer and template: so the HTTP side needs
neither. The other way round a difference of tools or model is put in front, where a template would show it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import xxhash

from lmtool.cluster.routing import Prompt

STEP_BYTES = 256  # about a block of the cache (64 tokens)
_FINER = 16  # steps grow with the place: a beginning is known to a sixteenth of its length
_BYTES_A_TOKEN = 4  # of English; for what a request costs, where nobody has counted


def read_prompt(body: Mapping[str, Any]) -> Prompt:
    """The prompt of a request's body. What is malformed is one with few tokens: the replica says what is wrong.

    A text of L bytes has about ``16 + 16 ln(L / 4096)`` hashes: 180 for the longest body that is taken.
    """
    data = prompt_text(body).encode(errors="replace")
    ids = body.get("prompt")
    counted = isinstance(ids, list) and bool(ids) and isinstance(ids[0], int)
    num_tokens = len(ids) if isinstance(ids, list) and counted else len(data) // _BYTES_A_TOKEN
    hashes, ends = [], []
    state, start = xxhash.xxh3_64(), 0
    while (end := start + max(STEP_BYTES, start // _FINER)) <= len(data):
        state.update(data[start:end])
        hashes.append(state.intdigest())
        ends.append(num_tokens * end // len(data))
        start = end
    return Prompt(tuple(hashes), tuple(ends), num_tokens)


def prompt_text(body: Mapping[str, Any]) -> str:
    """Tools, then messages in their order, or the prompt, whatever has been said of them: for comparing only."""
    parts = [_json(body[key]) for key in ("tools", "chat_template_kwargs", "instructions") if body.get(key)]
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list):
        parts += [_message(message) for message in messages]
    else:
        prompt = messages or body.get("prompt", "")
        parts.append(prompt if isinstance(prompt, str) else _json(prompt))
    return "\0".join(parts)


def _message(message: Any) -> str:
    """Without the JSON around it, where it is plain: an answer that is sent back has the words it was given with."""
    if isinstance(message, dict) and isinstance(message.get("content"), str) and set(message) <= {"role", "content"}:
        return f"{message.get('role')}\0{message['content']}"
    return _json(message)


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()
