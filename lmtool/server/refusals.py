"""What is refused, as a response."""

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lmtool.errors import LmtoolError
from lmtool.server.errors import Refusal, body_of, headers_of, status_of


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def refusal_response(error: LmtoolError) -> Response:
    return json_response(body_of(error), status_of(error), headers_of(error))


def of_http(error: HTTPException) -> Refusal:
    """Of a path or a method that there is not."""
    if error.status_code == 404:
        return Refusal(404, "there is no such path", "see /docs for those there are", code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return Refusal(405, "this path does not take that method", f"use {allowed}", code="method_not_allowed")
    return Refusal(error.status_code, str(error.detail))
