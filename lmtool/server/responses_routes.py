"""`/v1/responses`: an answer that is remembered and can be gone on from. Text, pictures and functions.

Each answer is remembered with the conversation that it ends, so that going on from it needs nothing else; it belongs to
the API key that asked. An answer that failed, or whose client went away, is not remembered.
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import msgspec
from fastapi import APIRouter, Request, Response

from lmtool.engine.sequence import Request as EngineRequest
from lmtool.errors import InputError, LmtoolError
from lmtool.images.prepared import PreparedImage
from lmtool.server.chat_prompt import ChatPrompt, chat_prompt, num_chars, plain_messages
from lmtool.server.chat_reader import ChatReader
from lmtool.server.context import ServerContext
from lmtool.server.dialogue import Dialogue, Message, next_ids
from lmtool.server.disconnect import until_gone
from lmtool.server.documents import Deleted, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.generate import Answers
from lmtool.server.json_body import json_route
from lmtool.server.owner import owner_of
from lmtool.server.protocol import Generation
from lmtool.server.protocol_responses import ResponsesRequest
from lmtool.server.refusals import json_response
from lmtool.server.responses_answer import ResponseAnswer, ResponseObject
from lmtool.server.responses_input import messages_of, pictures_of, response_format_of, tool_choice_of, tools_of
from lmtool.server.sse import EventStream
from lmtool.server.template_options import template_options
from lmtool.server.thought_form import after_thought
from lmtool.server.tools import ToolUse, prepare
from lmtool.server.translate import check_model, generation, off_the_loop, requests


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """response: JSON. dialogue: without the instructions."""

    response: bytes
    dialogue: Dialogue
    instructions: str | None


def responses_router(context: ServerContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["OpenAI"])

    @router.post("/v1/responses", responses=answers_documented(ResponseObject, streams=True))
    async def create_response(body: ResponsesRequest, http: Request) -> Response:
        """Answer, and remember the answer."""
        turn = await ResponsesTurn.of(context, owner_of(http, context.config), body)
        if body.stream:
            return EventStream(turn.events())
        async with until_gone(http.receive):
            return json_response(await turn.whole())

    @router.get("/v1/responses/{response_id}", responses=answers_documented(ResponseObject))
    async def get_response(response_id: str, http: Request) -> Response:
        """An answer that was given before."""
        found = await context.sessions.get(owner_of(http, context.config), response_id)
        if found is None:
            raise _unknown(response_id, None)
        return Response(msgspec.msgpack.decode(found, type=Remembered).response, media_type="application/json")

    @router.delete("/v1/responses/{response_id}", responses=answers_documented(Deleted))
    async def delete_response(response_id: str, http: Request) -> Response:
        """Forget an answer. Those that went on from it stay."""
        if not await context.sessions.delete(owner_of(http, context.config), response_id):
            raise _unknown(response_id, None)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    return router


def _unknown(response_id: str, param: str | None) -> Refusal:
    cause = f"there is no response {response_id[:100]!r}"
    fix = "give one that was stored; the oldest are forgotten, and another key's are not found"
    return Refusal(404 if param is None else 400, cause, fix, param=param, code="not_found")


@dataclass(slots=True)
class ResponsesTurn:
    """messages: the conversation before the answer, without the instructions."""

    context: ServerContext
    owner: str
    body: ResponsesRequest
    messages: list[Message]
    prompt: ChatPrompt
    asked: list[EngineRequest]
    answer: ResponseAnswer

    @classmethod
    async def of(cls, context: ServerContext, owner: str, body: ResponsesRequest) -> "ResponsesTurn":
        """Everything that can be refused is refused here."""
        check_model(context, body.model)
        if body.stream_options is not None and not body.stream:
            fix = "leave it out or give stream: true"
            raise Refusal(400, "stream_options is for streams", fix, param="stream_options")
        tokenizer = context.tokenizer
        use = prepare(tools_of(body), tool_choice_of(body), body.parallel_tool_calls, tokenizer)
        past = await _past(context, owner, body.previous_response_id)
        new = messages_of(body)
        try:
            images = [*(past.dialogue.images if past else ()), *await context.pictures.read(list(pictures_of(body)))]
            fresh = plain_messages(new, tokenizer)
            prompt = await _prompt(context, body, past, fresh, images, use)
        except (InputError, Refusal) as error:
            raise _of_input(error) from error
        settings = Generation(temperature=body.temperature, top_p=body.top_p)
        config = generation(context, settings, max_new_tokens=body.max_output_tokens, **_held(body, use))
        if prompt.opens_thought:
            config = replace(config, response_format=after_thought(config.response_format))
        reader = ChatReader(opens_thought=prompt.opens_thought, tools=use.reader() if use else None)
        return cls(
            context,
            owner,
            body,
            [*(past.dialogue.messages if past else ()), *fresh],
            prompt,
            requests(context, [prompt.ids], config, 1, "input", images),
            ResponseAnswer(body, context.config.model_names[0], config, reader, context.config.replica),
        )

    async def whole(self) -> dict[str, object]:
        async with Answers(self.context, self.asked) as answers:
            async for piece in answers:
                for _ in self.answer.push(piece):
                    pass
        for _ in self.answer.end():
            pass
        await self._remember()
        return self.answer.whole()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """After the first of them an error is an event, and the last one."""
        answer = self.answer
        async with contextlib.AsyncExitStack() as stack:
            answers = await stack.enter_async_context(Answers(self.context, self.asked))
            for event in answer.begin():
                yield answer.encoded(event)
            try:
                async for piece in answers:
                    for event in answer.push(piece):
                        yield answer.encoded(event)
                last = [*answer.end()]
                await self._remember()
                last.append(answer.last_event())
            except LmtoolError as error:
                last = [*answer.fail(error)]
        for event in last:
            yield answer.encoded(event)

    async def _remember(self) -> None:
        if self.body.store is False:
            return
        output, made = self.answer.output, self.answer.made
        said: Message = {"role": "assistant", "content": output.content}
        if output.calls:
            said["tool_calls"] = output.calls
        prompt, tokenizer = self.prompt, self.context.tokenizer
        dialogue = Dialogue.of(self.messages, prompt.ids, said, made, tokenizer, prompt.images)
        response = msgspec.json.encode(self.answer.whole())
        content = msgspec.msgpack.encode(Remembered(response, dialogue, self.body.instructions))
        await self.context.sessions.put(self.owner, self.answer.id, content)


async def _past(context: ServerContext, owner: str, response_id: str | None) -> Remembered | None:
    if response_id is None:
        return None
    found = await context.sessions.get(owner, response_id)
    if found is None:
        raise _unknown(response_id, "previous_response_id")
    return msgspec.msgpack.decode(found, type=Remembered)


async def _prompt(
    context: ServerContext,
    body: ResponsesRequest,
    past: Remembered | None,
    fresh: Sequence[Message],
    images: Sequence[PreparedImage],
    use: ToolUse | None,
) -> ChatPrompt:
    """fresh: what is new. Where nothing but messages was added, it begins with the ids that the past was computed
    with."""
    tokenizer = context.tokenizer
    options = template_options(tokenizer, None, body.reasoning.effort if body.reasoning else None)
    head: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*head, *(past.dialogue.messages if past else ()), *fresh]
    has_calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if past is None or past.instructions != body.instructions or use or options or has_calls:
        return await chat_prompt(tokenizer, messages, options, images=images, tool_use=use)
    whole = Dialogue([*head, *past.dialogue.messages], past.dialogue.ids)
    ids = await off_the_loop(num_chars(messages), lambda: next_ids(whole, fresh, tokenizer))
    return ChatPrompt.of(ids, tokenizer, images)


def _of_input(error: LmtoolError) -> LmtoolError:
    """What is wrong with messages is wrong with the input they were made of."""
    if isinstance(error, Refusal) and not (error.param or "").startswith("messages"):
        return error
    return Refusal(400, error.cause, error.fix, param="input")


def _held(body: ResponsesRequest, use: ToolUse | None) -> dict[str, object]:
    """What keeps the answer to a form."""
    form = response_format_of(body)
    if use is not None and use.response_format is not None:
        if form is not None:
            cause = "text.format and calls that are required or strict ask for two forms of one answer"
            raise Refusal(400, cause, "leave out one of them", param="text.format")
        form = dict(use.response_format)
    held: dict[str, object] = {} if form is None else {"response_format": form}
    if use is not None and not use.skip_special_tokens:
        held["skip_special_tokens"] = False
    return held
