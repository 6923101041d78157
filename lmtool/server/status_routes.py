"""What the server is and how it is: models, health, version, metrics."""

from typing import Any

from fastapi import APIRouter, Response

from lmtool import __version__
from lmtool.engine.requests import default_generation
from lmtool.server.context import ServerContext
from lmtool.server.documents import EngineStats, Health, Model, Models, Version, answers_documented
from lmtool.server.errors import Refusal
from lmtool.server.refusals import json_response
from lmtool.server.translate import check_model

SILENCE_S = 60.0  # the engine speaks between two steps; the longest, a chunk of a prompt on a slow CPU, takes seconds


def status_router(context: ServerContext) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/v1/models", responses=answers_documented(Models))
    async def models() -> Response:
        """The names that this server's model has."""
        return json_response({"object": "list", "data": [_model(context, name) for name in context.config.model_names]})

    @router.get("/v1/models/{model:path}", responses=answers_documented(Model))
    async def model(model: str) -> Response:
        check_model(context, model)
        return json_response(_model(context, model))

    @router.get("/health", responses=answers_documented(Health))
    async def health() -> Response:
        """Whether it lives: 200 while the engine is loading or is heard of, else 503."""
        status, message = engine_status(context)
        return json_response({"status": status, **message}, 200 if status in ("ready", "loading", "draining") else 503)

    @router.get("/ready", responses=answers_documented(Health))
    async def ready() -> Response:
        """Whether it takes requests: 200 or 503."""
        status, message = engine_status(context)
        return json_response({"status": status, **message}, 200 if status == "ready" else 503)

    @router.get("/version", responses=answers_documented(Version))
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(context.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/stats", responses=answers_documented(EngineStats))
    async def stats() -> Response:
        """The engine's last heartbeat as JSON: what runs, the cache, and totals, the host tier's too."""
        return json_response(_stats(context))

    @router.post("/v1/embeddings", responses=answers_documented(Model))
    async def embeddings() -> Response:
        """There are none."""
        raise Refusal(
            501,
            "this server generates text and makes no embeddings",
            "ask a server with an embedding model, such as text-embeddings-inference or Infinity",
            code="not_implemented",
        )

    return router


def engine_status(context: ServerContext) -> tuple[str, dict[str, str]]:
    """'ready', 'loading', 'draining', 'silent' or 'down', and what there is to say about it."""
    engine = context.engine
    if engine.failure is not None:
        return "down", {"message": str(engine.failure)}
    if engine.info is None:
        if engine.loading is not None:
            return "loading", {"message": engine.loading.what}
        return "down", {"message": "the engine is away; it is being started again"}
    if engine.silent_s > SILENCE_S:
        return "silent", {"message": f"nothing was heard of the engine for {engine.silent_s:.0f} s"}
    return ("draining", {}) if context.draining else ("ready", {})


def _stats(context: ServerContext) -> dict[str, Any]:
    info, found = context.engine.info, context.engine.stats
    if info is None or found is None:
        raise Refusal(503, "nothing was heard of the engine yet", "ask again in a moment", retry_after_s=1)
    return {
        "num_running": found.num_running,
        "num_waiting": found.num_waiting,
        "num_blocks": info.num_blocks,
        "num_free_blocks": found.num_free_blocks,
        "block_size": info.block_size,
        "num_host_blocks_used": found.num_host_blocks_used,
        "counters": found.counters,
    }


def _model(context: ServerContext, name: str) -> dict[str, Any]:
    info = context.engine.info
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "lmtool",
        "max_model_len": info.session_len if info else None,
        "generation_defaults": default_generation(info.generation_defaults) if info else None,
        "input_modalities": ["text", "image"] if context.pictures.are_taken else ["text"],
    }
