"""`/v1/chat/interactive`: a conversation that the server remembers, as LMDeploy 0.3 had it. Only the new turn is sent,
and, by the prefix cache, computed.

What is kept of a turn that is cut short (cancelled, or its client went away): the question and as much of the answer as
had been made, because that was seen; nothing where nothing had been made or where it failed.
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from typing_extensions import TypedDict

from lmtool.config import GenerationConfig
from lmtool.engine.response import Response as Piece
from lmtool.errors import InputError, LmtoolError
from lmtool.images.prepared import PreparedImage, count_tokens
from lmtool.server.answer_parts import finish_reason
from lmtool.server.chat_prompt import num_chars, plain_messages
from lmtool.server.context import ServerContext
from lmtool.server.dialogue import Dialogue, Message, next_ids
from lmtool.server.disconnect import until_gone
from lmtool.server.documents import answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.generate import Answers
from lmtool.server.json_body import json_route
from lmtool.server.owner import owner_of
from lmtool.server.pictures import Source, sources
from lmtool.server.protocol_interactive import InteractiveRequest
from lmtool.server.refusals import json_response
from lmtool.server.sessions import Turn
from lmtool.server.sse import DONE, EventStream, event
from lmtool.server.tools_messages import conversation
from lmtool.server.translate import check_model, named, off_the_loop, requests
from lmtool.tokenizer import Tokenizer

_NOTHING = {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "cached_tokens": 0, "finish_reason": None}


class InteractiveAnswer(TypedDict):
    """tokens: generated so far. input_tokens: of the new turn; history_tokens: of those before it. cached_tokens: of
    both, not computed again. finish_reason: stop, length or abort; null while there is more to come."""

    text: str
    tokens: int
    input_tokens: int
    history_tokens: int
    cached_tokens: int
    finish_reason: str | None


def interactive_router(context: ServerContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["LMDeploy"])

    @router.post("/v1/chat/interactive", responses=answers_documented(InteractiveAnswer, streams=True))
    async def chat_interactive(body: InteractiveRequest, http: Request) -> Response:
        """One turn of a conversation that is remembered here."""
        owner = owner_of(http, context.config)
        turn = InteractiveTurn(context, owner, body)
        if body.cancel or not body.prompt:
            return json_response(await turn.without_an_answer())
        if body.stream:
            return EventStream(_events(turn))
        whole: dict[str, Any] = _NOTHING
        async with until_gone(http.receive), contextlib.aclosing(turn.parts()) as parts:
            async for part in parts:
                whole = {**part, "text": whole["text"] + part["text"]}
        return json_response(whole)

    return router


async def _events(turn: "InteractiveTurn") -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(turn.parts()) as parts:
        async for part in parts:
            yield event(part)
    yield DONE


class InteractiveTurn:
    """Raises Refusal for what is asked and cannot be."""

    def __init__(self, context: ServerContext, owner: str, body: InteractiveRequest) -> None:
        check_model(context, body.model)
        if body.session_id < 0 and (body.interactive_mode or body.cancel):
            wish = "interactive_mode" if body.interactive_mode else "cancel"
            raise Refusal(400, f"{wish} has no session", "give a session_id of 0 or more", param="session_id")
        if body.interactive_mode and not body.prompt and not body.cancel:
            raise Refusal(400, "the prompt is empty", "give what is said next", param="prompt")
        self._context = context
        self._owner = owner
        self._body = body
        self._name = f"session {body.session_id}"
        self._config = _generation(context, body)

    async def without_an_answer(self) -> dict[str, Any]:
        """Cancel the turn under way, or end the session."""
        if self._body.session_id < 0:
            raise Refusal(400, "the prompt is empty", "give what is said", param="prompt")
        store = self._context.sessions
        if self._body.cancel:
            await store.cancel(self._owner, self._name)
        else:
            async with store.turn(self._owner, self._name):
                await store.delete(self._owner, self._name)
        return _NOTHING

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """`InteractiveAnswer`s whose texts are new only."""
        async with contextlib.AsyncExitStack() as stack:
            turn, past = Turn(), None
            if self._body.session_id >= 0:
                turn = await stack.enter_async_context(self._context.sessions.turn(self._owner, self._name))
                found = await self._context.sessions.get(self._owner, self._name)
                past = Dialogue.decode(found) if found else None
            tokenizer = self._context.tokenizer
            new = conversation(_messages(self._body, tokenizer), tokenizer)
            images = [*(past.images if past else ()), *await self._context.pictures.read(_sources(self._body))]
            ids, num_history = await self._read(past, new)
            asked = requests(self._context, [ids], self._config, 1, "prompt", images)
            made = Piece()
            try:
                async with Answers(self._context, asked) as answers:
                    turn.on_cancel(answers.cancel)
                    async for piece in answers:
                        made.extend(piece)
                        yield _part(piece, num_history)
            except LmtoolError:
                made = Piece()
                raise
            finally:
                await self._keep([*(past.messages if past else ()), *new], ids, images, made)

    async def _read(self, past: Dialogue | None, new: list[Message]) -> tuple[list[int], int]:
        """The prompt's ids, and how many of them are those of earlier turns."""
        tokenizer = self._context.tokenizer

        def read() -> tuple[list[int], int]:
            ids = next_ids(past, new, tokenizer)
            if past is None:
                return ids, 0
            before = past.ids or tokenizer.chat_ids(past.messages, add_generation_prompt=False)
            return ids, count_tokens(before, past.images)

        try:
            return await off_the_loop(num_chars([*new, *(past.messages if past else ())]), read)
        except InputError as error:
            raise Refusal(400, error.cause, error.fix, param="prompt") from error

    async def _keep(
        self, messages: list[Message], ids: list[int], images: Sequence[PreparedImage], made: Piece
    ) -> None:
        if self._body.session_id < 0 or not made.token_ids:
            return
        store = self._context.sessions
        if self._body.interactive_mode:
            said = {"role": "assistant", "content": made.text}
            dialogue = Dialogue.of(messages, ids, said, made, self._context.tokenizer, images)
            await store.put(self._owner, self._name, dialogue.encode())
        else:
            await store.delete(self._owner, self._name)


def _part(piece: Piece, num_history: int) -> dict[str, Any]:
    return {
        "text": piece.text,
        "tokens": piece.num_generated_tokens,
        "input_tokens": max(piece.num_prompt_tokens - num_history, 0),
        "history_tokens": num_history,
        "cached_tokens": piece.num_cached_tokens,
        "finish_reason": finish_reason(piece.finish_reason),
    }


def _messages(body: InteractiveRequest, tokenizer: Tokenizer) -> list[Message]:
    if not isinstance(body.prompt, str):
        return plain_messages(body.prompt, tokenizer)
    pictures = [{"type": "image"} for _ in _urls(body)]
    content = [*pictures, {"type": "text", "text": body.prompt}] if pictures else body.prompt
    return [{"role": "user", "content": content}]


def _sources(body: InteractiveRequest) -> list[Source]:
    if isinstance(body.prompt, str):
        return [Source(url, "image_url") for url in _urls(body)]
    if body.image_url is not None:
        fix = "put the pictures into the messages"
        raise Refusal(400, "image_url is for a prompt that is a text", fix, param="image_url")
    return list(sources(body.prompt, "prompt"))


def _urls(body: InteractiveRequest) -> list[str]:
    return [body.image_url] if isinstance(body.image_url, str) else body.image_url or []


def _generation(context: ServerContext, body: InteractiveRequest) -> GenerationConfig:
    config = context.config
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > config.max_stop or any(len(text) > config.max_stop_chars for text in stop):
        fix = f"give at most {config.max_stop} texts of at most {config.max_stop_chars} characters"
        raise Refusal(400, "stop has too many or too long texts", fix, param="stop")
    return named(
        lambda: GenerationConfig(
            max_new_tokens=body.request_output_len,
            stop=stop,
            top_p=body.top_p,
            top_k=body.top_k,
            temperature=body.temperature,
            repetition_penalty=body.repetition_penalty,
            ignore_eos=body.ignore_eos,
            skip_special_tokens=body.skip_special_tokens,
            seed=body.seed,
        )
    )
