"""`create_front`: the application at the one address. Everything it needs is in the context it is given.

A request is looked at for its model, its beginning and its size; whatever else it says is the replica's to judge.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from fastapi import APIRouter, FastAPI, Request, Response

from lmtool import __version__
from lmtool.cluster.directory import Record
from lmtool.cluster.figures import Figures
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.forward import Forward, Question
from lmtool.cluster.prefixes import read_prompt
from lmtool.cluster.replica_figures import merged
from lmtool.server.app import empty_app, guard
from lmtool.server.config import ServerConfig
from lmtool.server.documents import Health, Models, Version, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.json_body import Bodies, json_route
from lmtool.server.refusals import json_response

FORWARDED = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
_WITH_MEMORY = ("/v1/responses", "/v1/chat/interactive")
_BODY_BYTES = 64 << 20  # as a model that takes pictures: a replica without refuses more than its own 8 MiB
_GUESSED_TOKENS = 256  # of an answer whose request sets no limit
_FIGURES_S = 2.0  # for a replica's; Prometheus waits for ten by itself
_MOST_COUNTED = 1 << 20  # of a number that a client may give as it likes


@dataclass(slots=True)
class FrontContext:
    """config: of the front; its limits of one request are its replicas'. draining: no new requests are taken."""

    config: ServerConfig
    fleet: Fleet
    session: aiohttp.ClientSession
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    figures: Figures = field(init=False)
    bodies: Bodies = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.config.max_body_bytes or _BODY_BYTES)
        self.figures = Figures(self.fleet.models, self._gauges)

    def set_models(self, models: tuple[str, ...]) -> None:
        self.fleet.set_models(models)
        self.figures.set_models(models)

    def _gauges(self, model: str) -> dict[str, float]:
        known, router = self.fleet.replicas(model), self.fleet.router(model)
        return {
            "replicas": len(known),
            "replicas_ready": len(self.fleet.ready(model)),
            "queued_tokens": sum(router.queued_tokens(one.name) for one in known),
        }

    async def figures_of(self, replica: Record) -> tuple[str, str | None]:
        """Its name, and what it says; None where that takes too long."""
        headers = {"Authorization": f"Bearer {replica.key}"}
        try:
            async with (
                asyncio.timeout(_FIGURES_S),
                self.session.get(f"{replica.url}/metrics", headers=headers) as found,
            ):
                return replica.name, await found.text() if found.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError):
            return replica.name, None

    def model_of(self, body: Any) -> str:
        """Raises Refusal where it names none that there is."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", "ask another one", retry_after_s=5)
        name = body.get("model") if isinstance(body, dict) else None
        served = ", ".join(self.fleet.models)
        if name is None and isinstance(body, dict) and len(self.fleet.models) > 1:
            raise Refusal(400, "model is missing", f"give one of {served}", param="model")
        if name is None:
            return self.fleet.models[0]
        if name not in self.fleet.models:
            shown = name[:200] if isinstance(name, str) else name
            raise Refusal(
                404, f"there is no model {shown!r}", f"here is {served}", param="model", code="model_not_found"
            )
        return str(name)


def create_front(context: FrontContext) -> FastAPI:
    config = context.config
    app = empty_app(config, "OpenAI-compatible servers of several models behind one address.")
    app.include_router(_forwarding(context))
    app.include_router(_status(context))
    guard(app, config)
    return app


def _forwarding(context: FrontContext) -> APIRouter:
    router = APIRouter(route_class=json_route(context.bodies), tags=["OpenAI"])

    async def forward(http: Request) -> Response:
        """As `lmtool serve api_server` answers; the request goes to a replica of its model."""
        body = await http.json()
        model = context.model_of(body)
        known = body if isinstance(body, dict) else {}
        headers = {"Content-Type": "application/json"}
        if "x-request-id" in http.headers:
            headers["X-Request-Id"] = http.headers["x-request-id"]
        question = Question(
            model, http.url.path, await http.body(), headers, read_prompt(known), _num_new_tokens(known)
        )
        return Forward(context.fleet, context.session, context.figures, context.bodies, question)

    for path in FORWARDED:
        router.add_api_route(path, forward, methods=["POST"], name=path)

    async def remembers(http: Request) -> Response:
        """Not here: what a server remembers of a conversation is at one replica, and this one may be asked another."""
        raise Refusal(
            501,
            "conversations are not remembered behind a proxy",
            "send the whole conversation to /v1/chat/completions",
            code="not_implemented",
        )

    for path in _WITH_MEMORY:
        router.add_api_route(path, remembers, methods=["POST"], name=path)
    return router


def _num_new_tokens(body: Mapping[str, Any]) -> int:
    """At most, of all choices; a guess where nothing sets it. What is no number is the replica's to refuse."""
    most = _count(body.get("max_completion_tokens")) or _count(body.get("max_tokens")) or _GUESSED_TOKENS
    return most * (_count(body.get("n")) or 1)


def _count(value: object) -> int | None:
    return min(value, _MOST_COUNTED) if isinstance(value, int) and value > 0 else None


def _status(context: FrontContext) -> APIRouter:
    router, fleet = APIRouter(tags=["status"]), context.fleet

    @router.get("/v1/models", responses=answers_documented(Models))
    async def models() -> Response:
        """All models; of one that is not ready yet, its name."""
        return json_response({"object": "list", "data": [_card(context, name) for name in fleet.models]})

    @router.get("/v1/models/{model:path}", responses=answers_documented(Models))
    async def model(model: str) -> Response:
        return json_response(_card(context, context.model_of({"model": model})))

    @router.get("/health", responses=answers_documented(Health))
    async def health() -> Response:
        """Whether this process lives: 200."""
        return json_response({"status": "draining" if context.draining else "ready"})

    @router.get("/ready", responses=answers_documented(Health))
    async def ready() -> Response:
        """Whether every model has a replica that takes requests: 200 or 503."""
        missing = [name for name in fleet.models if not fleet.ready(name)]
        if context.draining:
            return json_response({"status": "draining"}, 503)
        if missing:
            return json_response({"status": "loading", "message": f"no replica is ready of {', '.join(missing)}"}, 503)
        return json_response({"status": "ready"})

    @router.get("/version", responses=answers_documented(Version))
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Figures for Prometheus: the front's own, and those of all replicas."""
        found = await asyncio.gather(*(context.figures_of(one) for name in fleet.models for one in fleet.ready(name)))
        text = context.figures.exposition() + merged({one: text for one, text in found if text is not None})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _card(context: FrontContext, name: str) -> dict[str, Any]:
    cards = [record.card for record in context.fleet.replicas(name) if record.card is not None]
    if cards:
        return {**cards[0], "created": context.created}
    unknown = {"max_model_len": None, "generation_defaults": None, "input_modalities": ["text"]}
    return {"id": name, "object": "model", "created": context.created, "owned_by": "lmtool", **unknown}
