"""The body of `/v1/responses`: text and pictures in, text and calls of functions out."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmtool.server.protocol import Many, MaxTokens, Strict

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class TextPart(Strict):
    """annotations, logprobs: of an earlier answer's text, given back as it came; there are none."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[Many[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[Many[Any], Field(max_length=0)] | None = None


class ImagePart(Strict):
    """image_url: as `protocol_chat.ImageUrl` has it."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "high"] | None = None
    file_id: None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class MessageItem(Strict):
    """id, status: of an earlier answer, given back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[Part]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResultItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Many[Part]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ReasoningPart(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """Of an earlier answer; what becomes of it is the template's business."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[Many[Any], Field(max_length=0)] | None = None
    content: Many[ReasoningPart] | None = None
    encrypted_content: None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def _kind(item: Any) -> Any:
    """A message need not say that it is one."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Strict):
    """name, schema, strict, description: of a json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: None = None


class Reasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponsesStreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Strict):
    """store: remember the answer, so that it can be asked for again and be a ``previous_response_id``; unless false.
    instructions: of this answer only, as OpenAI has it: they do not go on to the next.
    """

    model: str | None = None
    input: str | Annotated[Many[Item], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    # kept with the answer, and of no other effect by their nature
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # taken only with the value that changes nothing
    background: Literal[False] | None = None
    include: Annotated[Many[str], Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None
    access_programs: None = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    image: None = None
    max_tool_calls: None = None
    moderation: None = None
    prompt: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
