"""`/v1/chat/completions`."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from lmtool.engine.sequence import Request as EngineRequest
from lmtool.server.chat_answer import ChatAnswer
from lmtool.server.chat_prompt import chat_prompt, plain_messages
from lmtool.server.chat_reader import ChatReader
from lmtool.server.context import ServerContext
from lmtool.server.disconnect import until_gone
from lmtool.server.documents import ChatCompletion, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.generate import Answers
from lmtool.server.json_body import json_route
from lmtool.server.protocol_chat import ChatRequest
from lmtool.server.refusals import json_response
from lmtool.server.sse import EventStream
from lmtool.server.template_options import template_options
from lmtool.server.thought_form import after_thought
from lmtool.server.tools import ToolUse, prepare
from lmtool.server.translate import check_model, check_stream, generation, requests


def chat_router(context: ServerContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["OpenAI"])

    @router.post("/v1/chat/completions", responses=answers_documented(ChatCompletion, streams=True))
    async def create_chat_completion(body: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        asked, answer = await _prepared(context, body)
        if body.stream:
            return EventStream(_events(context, asked, answer, body))
        async with until_gone(http.receive), Answers(context, asked) as answers:
            return json_response(answer.whole(await answers.whole()))

    return router


async def _prepared(context: ServerContext, body: ChatRequest) -> tuple[list[EngineRequest], ChatAnswer]:
    """Everything that can be refused is refused here."""
    check_model(context, body.model)
    check_stream(body)
    tokenizer = context.tokenizer
    options = template_options(tokenizer, body.chat_template_kwargs, body.reasoning_effort)
    use = prepare(body.tools, body.tool_choice, body.parallel_tool_calls, tokenizer)
    config = generation(context, body, **_given(body, use))
    plain = plain_messages(body.messages, tokenizer)
    images = await context.pictures.of(body.messages)
    prompt = await chat_prompt(tokenizer, plain, options, images=images, tool_use=use)
    if prompt.opens_thought:
        config = replace(config, response_format=after_thought(config.response_format))
    num_choices = body.n or 1
    asked = requests(context, [prompt.ids], config, num_choices, "messages", images)
    readers = [
        ChatReader(opens_thought=prompt.opens_thought, tools=use.reader() if use else None) for _ in range(num_choices)
    ]
    return asked, ChatAnswer(tokenizer, context.config.model_names[0], readers)


def _given(body: ChatRequest, use: ToolUse | None) -> dict[str, Any]:
    """What `GenerationConfig` calls differently, and what tools ask of it."""
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs is for logprobs", "leave it out or give logprobs: true", param="top_logprobs")
    most = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(most) > 1:
        raise Refusal(400, "max_tokens and max_completion_tokens differ", "give one of them", param="max_tokens")
    form: Mapping[str, Any] | None = body.response_format
    given: dict[str, Any] = {"max_new_tokens": next(iter(most), None), "logprobs": body.num_logprobs}
    if use is not None:
        if use.response_format is not None and form is not None and form.get("type") != "text":
            raise Refusal(
                400,
                "response_format and calls that are required or strict ask for two forms of one answer",
                "leave out one of them",
                param="response_format",
            )
        form = use.response_format or form
        if not use.skip_special_tokens:
            given["skip_special_tokens"] = False
    return given | ({"response_format": form} if form is not None else {})


async def _events(
    context: ServerContext, asked: list[EngineRequest], answer: ChatAnswer, body: ChatRequest
) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    chunks = answer.begin(include_usage=bool(options and options.include_usage))
    async with Answers(context, asked) as answers:
        async for piece in answers:
            event = chunks.push(piece)
            if event is not None:
                yield event
    yield chunks.end()
