"""What the routes of one HTTP process share. No globals: `create_app` is given one, and hands it on."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from lmtool.engine.requests import RequestMaker, default_generation
from lmtool.images.form import ImageForm
from lmtool.server.config import ServerConfig
from lmtool.server.engine_client import EngineClient
from lmtool.server.errors import Refusal
from lmtool.server.json_body import Bodies
from lmtool.server.metrics import Metrics
from lmtool.server.pictures import Pictures
from lmtool.server.sessions import SessionStore
from lmtool.server.wire import EngineInfo, Stats
from lmtool.tokenizer import Tokenizer

_ID_BITS = 40  # of the requests of one HTTP process
_BODY_BYTES, _BODY_WITH_PICTURES_BYTES = 8 << 20, 64 << 20  # two of 20 MB, as base64


@dataclass(slots=True)
class ServerContext:
    """image_form: how the model takes pictures; None where it does not. number: of this HTTP process among
    `config.num_http_processes`. draining: no new requests are taken. sessions_path: a file, where there are several
    such processes; None: they are kept in this one's memory."""

    config: ServerConfig
    engine: EngineClient
    tokenizer: Tokenizer
    image_form: ImageForm | None = None
    number: int = 0
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    sessions_path: Path | None = None
    sessions: SessionStore = field(init=False)
    metrics: Metrics = field(init=False)
    pictures: Pictures = field(init=False)
    bodies: Bodies = field(init=False)
    _maker: RequestMaker | None = None

    def __post_init__(self) -> None:
        self.sessions = SessionStore(self.sessions_path, max_sessions=self.config.max_sessions)
        self.metrics = Metrics(self.config.model_names[0], self._figures)
        self.pictures = Pictures(self.image_form, self.config, self.metrics)
        usual = _BODY_WITH_PICTURES_BYTES if self.pictures.are_taken else _BODY_BYTES
        self.bodies = Bodies(self.config.max_body_bytes or usual)

    def _figures(self) -> tuple[EngineInfo, Stats] | None:
        info, stats = self.engine.info, self.engine.stats
        return None if info is None or stats is None else (info, stats)

    @property
    def info(self) -> EngineInfo:
        """Raises Refusal while there is no engine, or it is being drained."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", "ask another one", retry_after_s=5)
        if self.engine.info is None:
            said = "is loading" if self.engine.loading is not None else "is being started again"
            raise Refusal(503, f"the engine {said}", "ask again in a moment", retry_after_s=2)
        return self.engine.info

    @property
    def maker(self) -> RequestMaker:
        info = self.info
        if self._maker is None:
            first_id = self.number << _ID_BITS
            self._maker = RequestMaker(
                self.tokenizer, session_len=info.session_len, vocab_size=info.vocab_size, first_id=first_id
            )
        return self._maker

    def default_generation(self) -> dict[str, float]:
        """What the checkpoint recommends."""
        return default_generation(self.info.generation_defaults)

    def admit(self, num_requests: int) -> None:
        """Raises Refusal 429 where as many wait as may wait."""
        room = self.info.max_batch_size + self.config.max_queue
        if self.engine.num_open + num_requests > -(-room // self.config.num_http_processes):
            raise Refusal(
                429, f"{self.engine.num_open} requests are open already", "ask again in a moment", retry_after_s=1
            )
