"""What all of OpenAI's answers have in common: ids, usage, reasons to finish."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from lmtool import __version__
from lmtool.engine.response import Response

FINGERPRINT = f"lmtool-{__version__}"


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """kind: of object; prefix: of its id."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def finish_reason(reason: str | None) -> str | None:
    """OpenAI knows no full context: it is a limit as another."""
    return "length" if reason == "context" else reason


class Usage:
    """Counts tokens, piece by piece. A prompt is counted once, whatever the number of its choices."""

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._prompts: dict[int, tuple[int, int]] = {}
        self._generated: dict[int, int] = {}

    def take(self, piece: Response) -> None:
        self._generated[piece.index] = piece.num_generated_tokens
        if piece.index % self._num_choices == 0:
            self._prompts[piece.index] = piece.num_prompt_tokens, piece.num_cached_tokens

    def report(self) -> dict[str, Any]:
        num_prompt = sum(tokens for tokens, _ in self._prompts.values())
        num_generated = sum(self._generated.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


def usage_of(whole: Sequence[Response], num_choices: int) -> dict[str, Any]:
    usage = Usage(num_choices)
    for answer in whole:
        usage.take(answer)
    return usage.report()
