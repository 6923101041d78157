"""`create_front`: the application at the one address. Everything it needs is in the context it is given.

A request is looked at for its model, its beginning and its size; whatever else it says is the replica's to judge.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI, Response

from lmtool import __version__
from lmtool.cluster.context import FrontContext
from lmtool.cluster.forwarding import forwarding
from lmtool.cluster.replica_figures import merged
from lmtool.server.app import empty_app, guard
from lmtool.server.documents import Health, Models, Version, answers_documented
from lmtool.server.refusals import json_response


def create_front(context: FrontContext) -> FastAPI:
    config = context.config
    app = empty_app(config, "OpenAI-compatible servers of several models behind one address.")
    app.include_router(forwarding(context))
    app.include_router(_status(context))
    guard(app, config)
    return app


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
