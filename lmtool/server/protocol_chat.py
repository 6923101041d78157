"""The body of `/v1/chat/completions`. Knows neither templates nor tokens."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lmtool.server.protocol import Generation, Many, MaxTokens, Strict, TopLogprobs

Scalar = str | int | float | bool | None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """url: a data URL, or an http(s) one of a host that the server was told of."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class FunctionCall(Strict):
    """arguments: the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """Pictures are for users' messages. reasoning_content: of an earlier answer; what becomes of it is the template's
    business. refusal and annotations come back with answers that clients send again; no template knows them.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Many[Any] | None = None
    audio: None = None
    function_call: None = None


class Prompted(Strict):
    """A conversation, and what its template is told besides.

    chat_template_kwargs: values of variables that the model's template reads, such as enable_thinking.
    """

    messages: Annotated[Many[Message], Field(min_length=1)]
    tools: Many[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None


class ChatRequest(Generation, Prompted):
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # of no effect by their nature
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # taken only with the value that changes nothing
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Many[Literal["text"]] | None = None
    verbosity: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    functions: None = None
    function_call: None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
