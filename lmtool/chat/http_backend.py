"""A chat's backend at a URL: any OpenAI-compatible server, or a session of one that has `/v1/chat/interactive`.

What only some servers tell (the length of the context, how many tokens a conversation has) is None with the others.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import httpx

from lmtool.chat.backend import Message
from lmtool.chat.http_errors import refused, root_of, unreachable
from lmtool.chat.http_readers import ChatReader, InteractiveReader
from lmtool.chat.http_stream import HttpStream, make_client
from lmtool.config import GenerationConfig
from lmtool.errors import InputError, LmtoolError, RequestError

_ASIDE_S = 30.0  # for what is asked besides answers
_PATIENCE_S, _AGAIN_S = 10.0, 0.1
_OPENAI_TEMPERATURE = 1.0
_OFF = GenerationConfig()
_PICTURE = "<image>"  # what stands for one, or several in a row, where a prompt is shown
# sent where they are not off: not every server knows them
_OPTIONAL = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_INTERACTIVE = {"temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "stop", "seed"}


class HttpBackend:
    """model: None, the server's first. Raises LmtoolError where no server is, or it does not let us in."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        self.root = root_of(url)
        self._client = make_client(self.root, api_key)
        self._tells_tokens = True
        self._last: tuple[list[Message], dict[str, Any]] | None = None  # asked about, and what was told
        try:
            about = self._about(model)
        except BaseException:
            self._client.close()
            raise
        self.model: str = about["id"]
        self._session_len: int | None = about.get("max_model_len")
        self._modalities: list[str] | None = about.get("input_modalities")
        self.default_generation: dict[str, Any] = _defaults(about.get("generation_defaults"))

    @property
    def description(self) -> str:
        length = f" · context {self._session_len:,} tokens" if self._session_len else ""
        return f"{self.model} · {self.root}{length}"

    @property
    def session_len(self) -> int | None:
        return self._session_len

    @property
    def takes_pictures(self) -> bool | None:
        return None if self._modalities is None else "image" in self._modalities

    def stream(self, messages: Sequence[Message], config: GenerationConfig) -> HttpStream:
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **_sampling(config),
        }
        reader = ChatReader(self._session_len)
        return HttpStream(self._client, self.root, "/v1/chat/completions", body, reader)

    def count_tokens(self, messages: Sequence[Message]) -> int | None:
        found = self._tokenized(messages) if messages else None
        return None if found is None else int(found["count"])

    def render(self, messages: Sequence[Message]) -> str:
        """Raises InputError where the server does not tell."""
        found = self._tokenized(messages)
        if found is None:
            raise InputError(f"{self.root} does not tell what it gives the model", "ask a server that has /tokenize")
        return "".join(
            _PICTURE if is_picture else self._detokenized(list(ids))
            for is_picture, ids in groupby(found["tokens"], lambda token_id: token_id < 0)
        )

    def _detokenized(self, token_ids: list[int]) -> str:
        return str(self._post("/detokenize", {"model": self.model, "tokens": token_ids})["prompt"])

    def opens_thought(self, messages: Sequence[Message]) -> bool:
        """The server tells thoughts apart itself."""
        return False

    def close(self) -> None:
        self._client.close()

    # ------------------------------------------------------------------ besides answers
    def _about(self, model: str | None) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        try:
            found = self._get("/v1/models")["data"]
            names = [one["id"] for one in found]
            if model in (None, *names):
                return dict(found[names.index(model) if model else 0])
        except (LookupError, TypeError):
            raise InputError(f"{self.root} names no model", "give the address of an OpenAI-compatible server") from None
        raise InputError(f"{self.root} has no model {model!r}", "there is " + ", ".join(names))

    def _tokenized(self, messages: Sequence[Message]) -> dict[str, Any] | None:
        """Asked once for the same messages: with pictures they are megabytes."""
        if not self._tells_tokens:
            return None
        last = self._last
        if last is not None and last[0] == list(messages):
            return last[1]
        try:
            found = self._post("/tokenize", {"model": self.model, "messages": list(messages)})
            self._last = list(messages), found
            return found
        except _NotThere:
            self._tells_tokens = False
            return None

    def _get(self, path: str) -> dict[str, Any]:
        return self._asked(lambda: self._client.get(path, timeout=_ASIDE_S))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._asked(lambda: self._client.post(path, json=body, timeout=_ASIDE_S))

    def _asked(self, ask: Any) -> dict[str, Any]:
        try:
            response: httpx.Response = ask()
        except httpx.HTTPError as error:
            raise unreachable(self.root, error) from error
        if response.status_code in (404, 405) and response.request.method == "POST":
            raise _NotThere("it has no such path")
        if response.status_code != 200:
            raise refused(self.root, response)
        try:
            return dict(response.json())
        except (ValueError, TypeError):
            cause = f"what {self.root}{response.request.url.path} answers is no JSON object"
            raise InputError(cause, "give the address of an OpenAI-compatible server") from None


class _NotThere(LmtoolError):
    pass


class InteractiveBackend(HttpBackend):
    """The conversation is the server's: only what is new is sent. Where it was changed here (/undo, /clear, a stopped
    answer), it is begun anew on the server with all of it.

    A session that the server knows already is gone on with.
    """

    def __init__(self, url: str, session_id: int, *, api_key: str | None = None, model: str | None = None) -> None:
        super().__init__(url, api_key=api_key, model=model)
        self._session_id = session_id
        self._sent: list[Message] | None = []  # what the server was told, by this client; None: not certain

    @property
    def description(self) -> str:
        return f"{super().description} · session {self._session_id}"

    def stream(self, messages: Sequence[Message], config: GenerationConfig) -> HttpStream:
        others = [f.name for f in fields(config) if getattr(config, f.name) != getattr(_OFF, f.name)]
        for name in others:
            if name not in _INTERACTIVE:
                raise RequestError(f"a session does not take {name}", "leave it out, or leave out --session-id")
        known = self._sent
        if known is None or [*messages[: len(known)]] != known or len(messages) <= len(known):
            self._begin_anew()
            known = []
        body = {
            "model": self.model,
            "prompt": list(messages[len(known) :]),
            "session_id": self._session_id,
            "interactive_mode": True,
            "stream": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "repetition_penalty": config.repetition_penalty,
            "request_output_len": config.max_new_tokens,
            "stop": list(config.stop) or None,
        }
        if config.seed is not None:
            body["seed"] = config.seed
        self._sent = None
        reader = _Remembering(self, list(messages))
        return HttpStream(self._client, self.root, "/v1/chat/interactive", body, reader)

    def _begin_anew(self) -> None:
        """What the server knows is forgotten there, as soon as a turn that was stopped is over."""
        session = {"model": self.model, "prompt": "", "session_id": self._session_id}
        self._post("/v1/chat/interactive", {**session, "cancel": True})
        patient_until_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self._post("/v1/chat/interactive", session)
                return
            except RequestError:  # 409
                if time.monotonic() > patient_until_s:
                    raise
                time.sleep(_AGAIN_S)

    def was_answered(self, messages: list[Message], answer: str) -> None:
        self._sent = [*messages, {"role": "assistant", "content": answer}]


class _Remembering(InteractiveReader):
    """Tells the backend what the server then knows."""

    def __init__(self, backend: InteractiveBackend, messages: list[Message]) -> None:
        super().__init__()
        self._backend = backend
        self._messages = messages
        self._text = ""

    def take(self, said: dict[str, Any]) -> Any:
        delta = super().take(said)
        self._text += said.get("text") or ""
        return delta

    def finish(self, aborted: bool) -> Any:
        last = super().finish(aborted)
        if last is not None and not aborted:
            self._backend.was_answered(self._messages, self._text)
        return last


def _defaults(told: Any) -> dict[str, Any]:
    """What the server recommends, else OpenAI's."""
    known = {f.name for f in fields(GenerationConfig)}
    found = {name: value for name, value in told.items() if name in known} if isinstance(told, dict) else {}
    return {"temperature": _OPENAI_TEMPERATURE, **found}


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    """In OpenAI's words, and vLLM's for what OpenAI does not have."""
    body: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
    body |= {name: getattr(config, name) for name in _OPTIONAL if getattr(config, name) != getattr(_OFF, name)}
    if config.max_new_tokens is not None:
        body["max_tokens"] = config.max_new_tokens
    if config.stop:
        body["stop"] = list(config.stop)
    if config.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.logprobs}
    return body
