"""What the events of an answer mean: OpenAI's chat chunks, and `/v1/chat/interactive`'s parts. Knows no network."""

from typing import Any

from lmtool.chat.backend import Delta
from lmtool.tokenizer.thinking import CLOSE, OPEN


class ChatReader:
    """OpenAI's chunks of one choice. session_len: where it is known, a full context is told from max_tokens.

    A thought that the server has split off is put back between its tags, where the terminal expects it. Until the last
    delta, the number of tokens is that of the chunks: at least so many.
    """

    def __init__(self, session_len: int | None) -> None:
        self._session_len = session_len
        self._num_chunks = 0
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._in_thought = False

    def take(self, said: dict[str, Any]) -> Delta | None:
        self._usage = said.get("usage") or self._usage
        if not said.get("choices"):
            return None
        choice = said["choices"][0]
        self._reason = choice.get("finish_reason") or self._reason
        text = self._text(choice.get("delta") or {})
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if not text and not logprobs:
            return None
        self._num_chunks += 1
        return Delta(text=text, num_generated_tokens=self._num_chunks, logprobs=tuple(map(_entry, logprobs)))

    def finish(self, aborted: bool) -> Delta | None:
        if self._reason is None and not aborted:
            return None
        counts = self._usage
        num_prompt, num_generated = counts.get("prompt_tokens", 0), counts.get("completion_tokens", self._num_chunks)
        reason = "abort" if self._reason is None else self._reason
        if reason == "length" and self._session_len and num_prompt + num_generated >= self._session_len:
            reason = "context"
        return Delta(
            text=CLOSE if self._in_thought else "",
            finish_reason=reason,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=(counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            num_generated_tokens=num_generated,
        )

    def _text(self, delta: dict[str, Any]) -> str:
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or ""
        if thought and not self._in_thought:
            self._in_thought = True
            thought = f"{OPEN}\n{thought}"
        if content and self._in_thought:
            self._in_thought = False
            content = f"\n{CLOSE}\n\n{content}"
        return thought + content


class InteractiveReader:
    """Parts of LMDeploy's form, whose texts are new only."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def take(self, said: dict[str, Any]) -> Delta | None:
        self._last = said
        return Delta(text=said["text"], num_generated_tokens=said["tokens"]) if said.get("text") else None

    def finish(self, aborted: bool) -> Delta | None:
        last = self._last
        if last.get("finish_reason") is None and not aborted:
            return None
        return Delta(
            text="",
            finish_reason=last.get("finish_reason") or "abort",
            num_prompt_tokens=last.get("input_tokens", 0) + last.get("history_tokens", 0),
            num_cached_tokens=last.get("cached_tokens", 0),
            num_generated_tokens=last.get("tokens", 0),
        )


def _entry(token: dict[str, Any]) -> dict[str, Any]:
    """As `Delta.logprobs` has them; a server does not tell ids."""

    def one(found: dict[str, Any]) -> dict[str, Any]:
        return {"token_id": None, "token": found.get("token"), "logprob": found.get("logprob")}

    return {**one(token), "top": [one(other) for other in token.get("top_logprobs") or ()]}
