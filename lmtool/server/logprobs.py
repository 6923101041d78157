"""Tokens' probabilities in the two forms of OpenAI's: one entry for each token that usage counts."""

from collections.abc import Sequence
from typing import Any

from lmtool.engine.detokenizer import Detokenizer
from lmtool.engine.sequence import TokenLogprob
from lmtool.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Bytes are the token's own: those of several tokens may be one character."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in tokens
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """Of one answer, piece by piece; text_offset counts characters from its beginning, echoed prompt included."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer, (), skip_special)
        self._offset = 0

    def prompt(self, ids: Sequence[int], tokens: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """tokens: of all but the first, of which nobody knows."""
        return self._entries(list(ids), [None, *(tokens or ())])

    def push(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._entries([one.token_id for one in tokens], tokens)

    def _entries(self, ids: Sequence[int], tokens: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, one in zip(ids, tokens, strict=True):
            found["tokens"].append(self._name(token_id))
            found["token_logprobs"].append(one and one.logprob)
            found["top_logprobs"].append(one and self._top(one))
            found["text_offset"].append(self._offset)
            self._offset += len(self._text.push((token_id,)))
        return found

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        return {self._name(token_id): logprob for token_id, logprob in (*one.top, (one.token_id, one.logprob))}

    def _name(self, token_id: int) -> str:
        """The text; of half a character its bytes, as OpenAI writes them: names must differ."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
