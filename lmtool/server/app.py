"""`create_app`: the whole application of one HTTP process. Everything it needs is in the context it is given."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from lmtool import __version__
from lmtool.errors import LmtoolError
from lmtool.server.access import Keys, OwnNames
from lmtool.server.chat_routes import chat_router
from lmtool.server.completion_routes import completion_router
from lmtool.server.config import ServerConfig
from lmtool.server.context import ServerContext
from lmtool.server.disconnect import ClientGone
from lmtool.server.envelope import Envelope
from lmtool.server.interactive_routes import interactive_router
from lmtool.server.refusals import of_http, refusal_response
from lmtool.server.responses_routes import responses_router
from lmtool.server.status_routes import status_router
from lmtool.server.token_routes import token_router
from lmtool.server.validation import of_validation

_NOBODY = 499  # nginx's word for a client that did not wait


def empty_app(config: ServerConfig, description: str) -> FastAPI:
    """Without routes; its pages about itself where they are wanted."""
    return FastAPI(
        title="lmtool",
        version=__version__,
        description=description,
        openapi_url=None if config.disable_docs else "/openapi.json",
        docs_url=None if config.disable_docs else "/docs",
        redoc_url=None,
    )


def create_app(context: ServerContext) -> FastAPI:
    config = context.config
    app = empty_app(config, "An OpenAI-compatible server of one model.")
    for router in (
        chat_router,
        completion_router,
        responses_router,
        interactive_router,
        token_router,
        status_router,
    ):
        app.include_router(router(context))
    guard(app, config)
    return app


def guard(app: FastAPI, config: ServerConfig) -> None:
    """What every application of ours has around its routes: errors in OpenAI's form, who is let in, ids, a log."""
    _handle_errors(app)
    # the last one added is the first one asked; a browser's question before the request carries no key
    if config.api_keys:
        app.add_middleware(Keys, keys=config.api_keys)
    elif not config.is_public:
        app.add_middleware(OwnNames)
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(Envelope, log_requests=config.log_requests)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(LmtoolError)
    async def refused(request: Request, error: LmtoolError) -> Response:
        return refusal_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal_response(of_validation(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        response = refusal_response(of_http(error))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=_NOBODY)
