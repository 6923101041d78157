"""The pictures of a request: fetched from where they may be, read, and cut as the model's tower takes them, on threads
of their own. A request names no file of this machine, and an error tells nothing about it.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from lmtool.errors import InputError
from lmtool.images.form import ImageForm
from lmtool.images.prepared import PreparedImage
from lmtool.server.config import ServerConfig
from lmtool.server.errors import Refusal
from lmtool.server.metrics import Metrics
from lmtool.server.picture_cache import PictureCache
from lmtool.server.protocol_chat import ImagePart, Message

_NUM_READERS = 4  # at once: a picture of 50 megapixels is 150 MB until it is cut
_NUM_FETCHERS = 16  # that mostly wait


@dataclass(frozen=True, slots=True)
class Source:
    """param: where in the body it was."""

    url: str
    param: str


class Pictures:
    """Of one HTTP process. form: None where the model takes no pictures."""

    def __init__(self, form: ImageForm | None, config: ServerConfig, metrics: Metrics) -> None:
        self._form = form if config.max_images else None
        self._cache = PictureCache()
        self._config = config
        self._metrics = metrics
        self._readers = ThreadPoolExecutor(_NUM_READERS, "lmtool-pictures")
        self._fetchers = ThreadPoolExecutor(_NUM_FETCHERS, "lmtool-fetch")

    @property
    def are_taken(self) -> bool:
        return self._form is not None

    async def of(self, messages: Sequence[Message], param: str = "messages") -> list[PreparedImage]:
        """Those of a conversation, in their order. param: where in the body it is. Raises Refusal as `read` does."""
        return await self.read(list(sources(messages, param)))

    async def read(self, sources: Sequence[Source]) -> list[PreparedImage]:
        """Raises Refusal (400) that names the picture which cannot be read; 504 where all of it takes too long."""
        if not sources:
            return []
        if self._form is None:
            cause = "this model takes no pictures"
            raise Refusal(400, cause, "leave it out, or ask a model that sees", param=sources[0].param)
        most = self._config.max_images
        if len(sources) > most:
            cause = f"there are {len(sources)} pictures"
            raise Refusal(400, cause, f"give at most {most}", param=sources[most].param)
        seconds = self._config.request_timeout_s
        try:
            async with asyncio.timeout(seconds or None):
                return await self._all(self._form, sources)
        except TimeoutError:
            fix = "give fewer or smaller ones"
            raise Refusal(504, f"the pictures took longer than {seconds:g} s", fix, code="timeout") from None

    async def _all(self, form: ImageForm, sources: Sequence[Source]) -> list[PreparedImage]:
        once = {source.url: source for source in reversed(sources)}  # the first of equal ones
        tasks = [asyncio.create_task(self._one(form, source)) for source in once.values()]
        try:
            found = dict(zip(once, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
        return [found[source.url] for source in sources]

    async def _one(self, form: ImageForm, source: Source) -> PreparedImage:
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            data = None
            if source.url[:5].lower() != "data:":
                self._check_url(source)
                data = await loop.run_in_executor(self._fetchers, partial(_fetched, source.url, self._config))
            image = await loop.run_in_executor(self._readers, _prepared, form, self._cache, source.url, data)
        except InputError as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal(400, error.cause, error.fix, param=source.param) from error
        self._metrics.take_image(time.perf_counter() - began)
        return image

    def _check_url(self, source: Source) -> None:
        if not source.url[:8].lower().startswith(("http://", "https://")):
            fix = "give data:image/png;base64,… or an http(s) URL"
            raise Refusal(400, "a picture's URL is of another kind", fix, param=source.param)
        if not self._config.allowed_image_hosts:
            fix = "give a data: URL; only a server that was started with --allowed-image-hosts fetches pictures"
            raise Refusal(400, "this server fetches no pictures", fix, param=source.param)


def _fetched(url: str, config: ServerConfig) -> bytes:
    from lmtool.images.fetch import fetch_image

    return fetch_image(url, allowed_hosts=config.allowed_image_hosts)


def _prepared(form: ImageForm, cache: PictureCache, url: str, data: bytes | None) -> PreparedImage:
    from lmtool.images.load import data_url_bytes, decode_image

    return cache.get(data_url_bytes(url) if data is None else data, lambda found: form.prepare(decode_image(found)))


def sources(messages: Sequence[Message], param: str) -> Iterator[Source]:
    """Raises Refusal for a picture in another message than the user's."""
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ImagePart):
                yield source_of(part.image_url.url, message.role, f"{param}[{i}].content[{j}].image_url")


def source_of(url: str, role: str, param: str) -> Source:
    """Raises Refusal for another role than the user."""
    if role != "user":
        raise Refusal(400, f"a picture is in a message of the {role}", "put it into one of the user", param=param)
    return Source(url, param)
