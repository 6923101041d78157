"""What answers look like, for the OpenAPI page. The answers themselves are made without these: they are made often."""

from typing import Any, NotRequired

from typing_extensions import TypedDict


class ErrorDetails(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorDetails


class CachedTokens(TypedDict):
    cached_tokens: int


class UsageReport(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenProbability(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenProbabilities(TokenProbability):
    top_logprobs: list[TokenProbability]


class ChatLogprobs(TypedDict):
    content: list[TokenProbabilities]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str


class Call(TypedDict):
    id: str
    type: str
    function: CalledFunction


class AnswerMessage(TypedDict):
    role: str
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class Answered(TypedDict):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageReport


class ChatCompletion(Answered):
    choices: list[ChatChoice]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class Completion(Answered):
    choices: list[CompletionChoice]


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    generation_defaults: dict[str, float] | None
    input_modalities: list[str]


class Models(TypedDict):
    object: str
    data: list[Model]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class Encoded(TypedDict):
    input_ids: list[int] | list[list[int]]
    length: int | list[int]


class Health(TypedDict):
    status: str
    message: NotRequired[str]


class EngineStats(TypedDict):
    """counters: totals since the engine started, under their own names."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    num_host_blocks_used: int
    counters: dict[str, float]


class Deleted(TypedDict):
    id: str
    object: str
    deleted: bool


class Version(TypedDict):
    version: str


def answers_documented(kind: Any, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``: what it answers when all is well, and how errors look."""
    well: dict[str, Any] = {"model": kind}
    if streams:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        well["content"] = {"text/event-stream": {"schema": event}}
    return {200: well, "4XX": {"model": Error}, "5XX": {"model": Error}}
