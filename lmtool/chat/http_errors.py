"""What goes wrong with a server, as one line with a cause and a fix. Knows httpx, and no terminal."""

import json

import httpx

from lmtool.errors import ConfigError, EngineError, InputError, LmtoolError, RequestError

_MOST_WORDS = 300  # characters of a server's own message that are shown


def root_of(url: str) -> str:
    """The server's address without ``/v1``. Raises ConfigError for what is no address."""
    try:
        is_one = url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        is_one = False
    if not is_one:
        raise ConfigError(f"URL is {url!r}", "give one as in http://localhost:23333")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def unreachable(root: str, error: httpx.HTTPError) -> LmtoolError:
    """Nothing was answered."""
    cause = error.__cause__ or error
    words = " ".join(str(cause).split()) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return InputError(f"{root} does not answer in time", "see whether the server is busy, or give another address")
    if "refused" in words.lower():
        return InputError(f"nothing listens at {root}", "start the server, or give its address")
    return InputError(f"{root} cannot be reached: {words[:_MOST_WORDS]}", "give the address of a server that runs")


def broken(root: str) -> LmtoolError:
    """An answer that ended before its end."""
    return EngineError(f"{root} broke the answer off", "see the server's log, and ask again")


def refused(root: str, response: httpx.Response) -> LmtoolError:
    """A status that is no success; the body was read."""
    status, words = response.status_code, _message(response)
    said = f": {words}" if words else ""
    if status in (401, 403):
        return InputError(f"{root} lets nobody in without a key of its own{said}", "give --api-key")
    if status == 404:
        cause = f"{root} does not know {response.request.url.path}{said}"
        return InputError(cause, "give the address of an OpenAI-compatible server, and a model that it has")
    if status in (429, 503):
        return EngineError(f"{root} takes no request now{said}", None if words else "ask again in a moment")
    if status < 500:
        return RequestError(f"{root} refuses this{said or f' ({status})'}")
    return EngineError(f"{root} failed ({status}){said}", None if words else "see the server's log")


def said_error(root: str, error: object) -> LmtoolError:
    """An error event in the middle of a stream."""
    return EngineError(f"{root} ended the answer: {_words(error) or 'it does not say why'}")


def _message(response: httpx.Response) -> str:
    try:
        return _words(json.loads(response.content).get("error"))
    except (ValueError, AttributeError, RecursionError):
        return ""


def _words(error: object) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(text.split())[:_MOST_WORDS] if isinstance(text, str) else ""
