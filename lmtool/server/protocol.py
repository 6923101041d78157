"""What may be asked for in the body of a request for text: the fields that chat and completions share.

Every field of OpenAI's is here, or its fix is in `SENTENCES`: it is honoured, has no effect by its nature, or may only
have the value that changes nothing. A field that is not here is refused by name. Knows neither tokens nor the engine.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from lmtool.config import MAX_LOGPROBS

T = TypeVar("T")
Many = Annotated[
    list[T], Field(fail_fast=True)
]  # the first that is wrong is told: a million of them would take half a minute
Id = Annotated[int, Field(ge=0, lt=2**31)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]

# what to do instead, where a field is known and is not taken, or not with that value
SENTENCES = {
    "access_programs": "leave it out: this server has none",
    "adapter_name": "leave it out: this server has one model and no adapters",
    "audio": "leave it out: answers are text",
    "background": "leave it out or give false: an answer is made while its client waits",
    "background_options": "leave it out: an answer is made while its client waits",
    "best_of": "leave it out or give it the value of n: every answer that is made is returned",
    "context_management": "leave it out: send fewer messages where a conversation gets too long",
    "conversation": "use previous_response_id",
    "detail": "give 'auto' or 'high', or leave it out: a picture is always seen whole, at the model's own resolution",
    "file": "put its text into a text part",
    "file_id": "give image_url: this server keeps no files",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": 'use response_format: {"type": "choice", "choice": […]}',
    "guided_grammar": 'use response_format: {"type": "grammar", "grammar": "…"}',
    "guided_json": 'use response_format: {"type": "json_schema", "json_schema": {"name": "…", "schema": {…}}}',
    "guided_regex": 'use response_format: {"type": "regex_schema", "regex_schema": "…"}',
    "include": "leave it out: answers have text and calls; /v1/chat/completions has logprobs",
    "include_obfuscation": "leave it out or give false: nothing is added to hide lengths",
    "input_audio": "leave it out: this server's models do not hear",
    "input_file": "put its text into an input_text part",
    "max_tool_calls": "leave it out: the only tools are functions, and you call them",
    "modalities": 'leave it out or give ["text"]',
    "moderation": "leave it out: this server does not moderate; a service in front of it may",
    "prediction": "leave it out: equal beginnings of prompts are computed once by themselves",
    "prompt_cache_options": "leave it out: equal beginnings of prompts are found by themselves",
    "prompt_cache_retention": "leave it out: what was computed stays as long as there is room",
    "service_tier": "leave it out or give 'auto': all requests are equal",
    "store": "leave it out or give false; /v1/responses remembers answers",
    "suffix": "put what comes after the gap into the prompt, in the form that the model was trained on",
    "summary": "leave it out: a thought is told as it is",
    "truncation": "leave it out or give 'disabled': a conversation that is too long is refused",
    "verbosity": "ask for it in a message",
    "web_search_options": "leave it out: this server does not search; tools may",
}


class Strict(BaseModel):
    """Nothing is converted, nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(Strict):
    """How answers are made. None: as the model's makers recommend, else as OpenAI does.

    top_k -1 and 0 are off. seed: choice i of n gets seed + i. min_tokens: no stop token before.
    """

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Many[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # beyond OpenAI's, under vLLM's and LMDeploy's names
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: Annotated[Many[Id], Field(max_length=256)] | None = None
    bad_words: Annotated[Many[Annotated[str, Field(min_length=1)]], Field(max_length=256)] | None = None
    response_format: dict[str, Any] | None = None
