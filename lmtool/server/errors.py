"""What goes wrong, as OpenAI's clients expect it: ``{"error": {"message", "type", "param", "code"}}`` and a status.

Refusal          a status of its own, raised by routes
InputError       400: the request cannot be done as it stands
EngineError      503: the engine is away or failed; asking again may help
anything else    500
"""

import re
from typing import Any

from lmtool.errors import EngineError, InputError, LmtoolError, RequestError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Refusal(LmtoolError):
    """param: the field that is wrong. code: OpenAI's word for it, where there is one. retry_after_s: a header."""

    def __init__(
        self,
        status: int,
        cause: str,
        fix: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(cause, fix)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


def status_of(error: LmtoolError) -> int:
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, EngineError) else 500


def body_of(error: LmtoolError) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param, code = (error.param, error.code) if isinstance(error, Refusal) else (_field(error), None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def _field(error: LmtoolError) -> str | None:
    """What the engine refuses begins with the field's name: 'response_format: …'."""
    found = re.match(r"([a-z_]+): ", error.cause) if isinstance(error, RequestError) else None
    return found[1] if found else None


def headers_of(error: LmtoolError) -> dict[str, str]:
    seconds = error.retry_after_s if isinstance(error, Refusal) else None
    if seconds is None and status_of(error) == 503:
        seconds = 1
    return {} if seconds is None else {"Retry-After": str(seconds)}
