"""`Response`, an answer or a piece of one, and `Answers`, the pieces as they come. Knows no prompt and no template."""

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lmtool.config import GenerationConfig
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.core import TokenOutput
from lmtool.engine.detokenizer import Detokenizer
from lmtool.engine.sequence import Request, TokenLogprob


@dataclass(slots=True, kw_only=True)
class Response:
    """An answer, or from `Pipeline.stream_infer` the next piece of it (``text`` and ``token_ids`` are then new only).

    finish_reason          'stop', 'length' (max_new_tokens), 'context' (the context is full), 'abort'; None: not yet
    prompt_logprobs        of the prompt's tokens from its second on, where they were asked for; with the first piece
    num_cached_tokens      of the prompt, found in the prefix cache and not computed again
    time_to_first_token_s, duration_s   from the call, in seconds
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    finish_reason: str | None = None
    time_to_first_token_s: float | None = None
    duration_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Generation speed after the first token; None before the second."""
        if self.num_generated_tokens < 2 or self.duration_s is None or self.time_to_first_token_s is None:
            return None
        return (self.num_generated_tokens - 1) / max(self.duration_s - self.time_to_first_token_s, 1e-9)

    def extend(self, part: "Response") -> None:
        """Take in the next piece."""
        self.text += part.text
        self.token_ids += part.token_ids
        if part.logprobs:
            self.logprobs = (self.logprobs or []) + part.logprobs
        if part.prompt_logprobs is not None:
            self.prompt_logprobs = part.prompt_logprobs
        for name in (
            "num_prompt_tokens",
            "num_cached_tokens",
            "num_generated_tokens",
            "finish_reason",
            "time_to_first_token_s",
            "duration_s",
        ):
            setattr(self, name, getattr(part, name))


class Answer:
    """One request on its way: engine outputs in, `Response` pieces out."""

    def __init__(self, index: int, request: Request, detokenizer: Detokenizer, started: float) -> None:
        self.index = index
        self.request = request
        self._detokenizer = detokenizer
        self._started = started
        self._num_generated = 0
        self._num_cached = 0
        self._first_token_s: float | None = None

    def take(self, outputs: Sequence[TokenOutput]) -> Response:
        """The piece that these outputs are, in their order. Raises the error that ended the request.

        What comes after a stop text is no part of it: the caller then ends the request.
        """
        text, token_ids, logprobs, prompt_logprobs, finish_reason = "", [], [], None, None
        now = time.perf_counter() - self._started
        for output in outputs:
            if output.error is not None:
                raise output.error
            finish_reason = output.finish_reason
            self._num_cached = output.num_cached_tokens or self._num_cached
            if output.logprob is not None:
                logprobs.append(output.logprob)
            if output.prompt_logprobs is not None:  # of the first one only, with which others may have come
                prompt_logprobs = output.prompt_logprobs
            if output.token_id is not None:
                self._first_token_s = self._first_token_s or now
                token_ids.append(output.token_id)
                if not (finish_reason == "stop" and output.token_id in self.request.stop_ids):
                    text += self._detokenizer.push((output.token_id,))
            if finish_reason is not None:
                text += self._detokenizer.flush()
            if self._detokenizer.stopped:
                finish_reason = "stop"
                break
        self._num_generated += len(token_ids)
        return Response(
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs or None,
            prompt_logprobs=prompt_logprobs,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=self._num_cached,
            num_generated_tokens=self._num_generated,
            finish_reason=finish_reason,
            time_to_first_token_s=self._first_token_s,
            duration_s=now,
        )


class Answers(Iterator[Response]):
    """The pieces of several answers, in the order in which they come. Dropping it ends what is still running."""

    def __init__(
        self, engine: AsyncEngine, requests: Sequence[Request], detokenizer: Callable[[GenerationConfig], Detokenizer]
    ) -> None:
        self._engine = engine
        self._outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
        self._arrived: deque[TokenOutput] = deque()
        started = time.perf_counter()
        self._open = {
            request.request_id: Answer(index, request, detokenizer(request.params), started)
            for index, request in enumerate(requests)
        }
        take = self._outputs.put  # one object: what a step gives to all of these comes as one list
        for request in requests:
            engine.submit(request, take)

    def __next__(self) -> Response:
        while self._open:
            if not self._arrived:
                self._arrived.extend(self._outputs.get())
            output = self._arrived.popleft()
            answer = self._open.get(output.request_id)
            if answer is None:  # a token that was on its way when a stop text ended the answer
                continue
            if output.finish_reason is not None:
                del self._open[output.request_id]
            part = answer.take((output,))
            if part.finish_reason is not None and output.finish_reason is None:
                del self._open[output.request_id]
                self._engine.abort(output.request_id)
            return part
        raise StopIteration

    def abort(self) -> None:
        """End every answer that is still running, at any moment and from any thread: each gets a last piece."""
        for request_id in list(self._open):
            self._engine.abort(request_id)

    def close(self) -> None:
        """`abort`, and give no more pieces. For the thread that iterates."""
        self.abort()
        self._open.clear()

    def __del__(self) -> None:
        if getattr(self, "_open", None):
            self.close()
