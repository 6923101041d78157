"""`/v1/completions`."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from lmtool.engine.sequence import Request as EngineRequest
from lmtool.errors import InputError
from lmtool.server.completion_answer import CompletionAnswer, Prompt, Wanted
from lmtool.server.context import ServerContext
from lmtool.server.disconnect import until_gone
from lmtool.server.documents import Completion, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.generate import Answers
from lmtool.server.json_body import json_route
from lmtool.server.protocol_completion import DEFAULT_MAX_TOKENS, CompletionRequest
from lmtool.server.refusals import json_response
from lmtool.server.sse import EventStream
from lmtool.server.translate import check_model, check_stream, generation, off_the_loop, requests
from lmtool.tokenizer import Tokenizer


def completion_router(context: ServerContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["OpenAI"])

    @router.post("/v1/completions", responses=answers_documented(Completion, streams=True))
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        """Go on with a text, or with several."""
        asked, answer = await _prepared(context, body)
        if body.stream:
            return EventStream(_events(context, asked, answer, body))
        async with until_gone(http.receive), Answers(context, asked, continues=True) as answers:
            return json_response(answer.whole(await answers.whole()))

    return router


async def _prepared(context: ServerContext, body: CompletionRequest) -> tuple[list[EngineRequest], CompletionAnswer]:
    """Everything that can be refused is refused here."""
    check_model(context, body.model)
    check_stream(body)
    num_choices = body.n or 1
    if body.best_of not in (None, num_choices):
        raise Refusal(
            400,
            f"best_of is {body.best_of}",
            "leave it out or give it the value of n: every answer that is made is returned",
            param="best_of",
        )
    config = generation(context, body, **_given(body))
    prompts = await _prompts(context.tokenizer, body)
    asked = requests(context, [prompt.ids for prompt in prompts], config, num_choices, "prompt")
    wanted = Wanted(
        num_choices=num_choices,
        echo=bool(body.echo),
        logprobs=body.logprobs is not None,
        generates=body.max_tokens != 0,
        skip_special=config.skip_special_tokens,
    )
    return asked, CompletionAnswer(context.tokenizer, context.config.model_names[0], prompts, wanted)


def _given(body: CompletionRequest) -> dict[str, Any]:
    """What `GenerationConfig` calls differently. The engine makes at least one token, which may then be kept quiet."""
    most = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
    given: dict[str, Any] = {"max_new_tokens": most, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        given["prompt_logprobs"] = body.logprobs
    return given | ({"response_format": body.response_format} if body.response_format is not None else {})


async def _prompts(tokenizer: Tokenizer, body: CompletionRequest) -> list[Prompt]:
    """The caller writes the whole prompt, so names of special tokens in it are those tokens."""

    def read(prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            add_special = body.add_special_tokens is not False
            return Prompt(tokenizer.encode(prompt, add_special=add_special, parse_special=True), prompt)
        text = tokenizer.decode(prompt, skip_special=body.skip_special_tokens is not False) if body.echo else ""
        return Prompt(prompt, text)

    prompts = body.prompts
    try:
        return await off_the_loop(sum(map(len, prompts)), lambda: [read(prompt) for prompt in prompts])
    except InputError as error:
        raise Refusal(400, error.cause, error.fix, param="prompt") from error


async def _events(
    context: ServerContext, asked: list[EngineRequest], answer: CompletionAnswer, body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    chunks = answer.begin(include_usage=bool(options and options.include_usage))
    async with Answers(context, asked, continues=True) as answers:
        async for piece in answers:
            event = chunks.push(piece)
            if event is not None:
                yield event
    yield chunks.end()
