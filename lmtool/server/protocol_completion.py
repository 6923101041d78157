"""The body of `/v1/completions`."""

from typing import Annotated

from pydantic import Field

from lmtool.server.protocol import Generation, Id, Many, TopLogprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's

Ids = Annotated[Many[Id], Field(min_length=1)]


class CompletionRequest(Generation):
    """A prompt is text or token ids; several are answered side by side.

    max_tokens 0: nothing is generated; with echo and logprobs the prompt's own are told. add_special_tokens: put the
    tokenizer's beginning (BOS) before a text.
    """

    prompt: str | Ids | Annotated[Many[str], Field(min_length=1)] | Annotated[Many[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: int | None = None
    suffix: None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)
