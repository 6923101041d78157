"""The routes that are passed on to replicas. Which of them remembers a response or a session, and whose that is, the
front says.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from lmtool.cluster.context import FrontContext
from lmtool.cluster.forward import Forward, Question
from lmtool.cluster.prefixes import read_prompt
from lmtool.cluster.sessions import Place, Turn
from lmtool.server.documents import Deleted, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.json_body import json_route
from lmtool.server.owner import OWNER_HEADER, owner_of
from lmtool.server.responses_answer import ResponseObject

FORWARDED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/encode",
    "/tokenize",
    "/detokenize",
)
_GUESSED_TOKENS = 256  # of an answer whose request sets no limit
_MOST_COUNTED = 1 << 20  # of a number that a client may give as it likes
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "request_output_len")


def forwarding(context: FrontContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["OpenAI"])

    async def forward(http: Request) -> Response:
        """As `lmtool serve api_server` answers; the request goes to a replica of its model."""
        body = await http.json()
        model = context.model_of(body)
        past = body.get("previous_response_id") if isinstance(body, dict) else None
        replica = _replica_of(context, past, model, "previous_response_id") if isinstance(past, str) else None
        return await _passed_on(context, http, model, body, Turn(Place(replica)))

    for path in FORWARDED:
        router.add_api_route(path, forward, methods=["POST"], name=path)

    async def remembered(response_id: str, http: Request) -> Response:
        """A response that a replica remembers."""
        context.check_open()
        replica = _replica_of(context, response_id, None, None)
        model = context.fleet.model_of(replica) or ""
        turn = Turn(Place(replica))
        return _forward(context, Question(model, http.method, http.url.path, b"", _headers(context, http), turn=turn))

    for method, answer in (("GET", ResponseObject), ("DELETE", Deleted)):
        router.add_api_route(
            "/v1/responses/{response_id}",
            remembered,
            methods=[method],
            name=f"{method} response",
            responses=answers_documented(answer),
        )

    @router.post("/v1/chat/interactive")
    async def interactive(http: Request) -> Response:
        """A turn of a conversation that a replica remembers by its ``session_id``."""
        body = await http.json()
        model = context.model_of(body)
        return await _passed_on(context, http, model, body, _turn(context, http, model, body))

    return router


async def _passed_on(context: FrontContext, http: Request, model: str, body: Any, turn: Turn) -> Response:
    known = body if isinstance(body, dict) else {}
    headers = {**_headers(context, http), "Content-Type": "application/json"}
    prompt, num_new_tokens = read_prompt(known), _num_new_tokens(known)
    return _forward(
        context,
        Question(model, "POST", http.url.path, await http.body(), headers, prompt, num_new_tokens, turn),
    )


def _forward(context: FrontContext, question: Question) -> Response:
    return Forward(context.fleet, context.session, context.figures, context.bodies, question)


def _headers(context: FrontContext, http: Request) -> dict[str, str]:
    headers = {OWNER_HEADER: owner_of(http, context.config)}
    if "x-request-id" in http.headers:
        headers["X-Request-Id"] = http.headers["x-request-id"]
    return headers


def _replica_of(context: FrontContext, response_id: str, model: str | None, param: str | None) -> str:
    """Its name. model: that it has to be of. Raises Refusal where it is not there any more, or never was."""
    replica = response_id.removeprefix("resp_").partition("_")[0]
    found = context.fleet.model_of(replica)
    if found is None:
        raise Refusal(
            400 if param else 404,
            f"there is no response {response_id[:100]!r}, or the replica that remembered it is gone",
            "send the whole conversation",
            param=param,
            code="not_found",
        )
    if model not in (None, found):
        cause = f"response {response_id[:100]!r} is of the model {found}"
        raise Refusal(400, cause, f"give model {found}, or send the whole conversation", param=param)
    return replica


def _turn(context: FrontContext, http: Request, model: str, body: Any) -> Turn:
    """Of the session that the body names. Raises Refusal where its replica is gone, and it is to go on."""
    session_id = body.get("session_id") if isinstance(body, dict) else None
    if not isinstance(session_id, int) or isinstance(session_id, bool) or session_id < 0:
        return Turn()  # none, or what is the replica's to refuse
    place = context.sessions.place(owner_of(http, context.config), model, session_id)
    there = place.replica if context.fleet.model_of(place.replica or "") == model else None
    if body.get("cancel"):
        return Turn(Place(there))  # where the conversation is, is not its affair
    if body.get("prompt") and there != place.replica:
        raise Refusal(
            404,
            f"the replica that remembers session {session_id} is gone",
            "end it by an empty prompt, then send the whole conversation",
            param="session_id",
            code="not_found",
        )
    place.replica = there
    return Turn(place, ends=not body.get("interactive_mode"))


def _num_new_tokens(body: Mapping[str, Any]) -> int:
    """At most, of all choices; a guess where nothing sets it. What is no number is the replica's to refuse."""
    most = next((count for name in _LIMITS if (count := _count(body.get(name)))), _GUESSED_TOKENS)
    return most * (_count(body.get("n")) or 1)


def _count(value: object) -> int | None:
    return min(value, _MOST_COUNTED) if isinstance(value, int) and value > 0 else None
