"""What the front's routes are given: `FrontContext`. No globals."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lmtool.cluster.directory import Record
from lmtool.cluster.figures import Figures
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.sessions import Sessions
from lmtool.server.config import ServerConfig
from lmtool.server.errors import Refusal
from lmtool.server.json_body import Bodies

_BODY_BYTES = 64 << 20  # as a model that takes pictures: a replica without refuses more than its own 8 MiB
_FIGURES_S = 2.0  # for a replica's; Prometheus waits for ten by itself


@dataclass(slots=True)
class FrontContext:
    """config: of the front; its limits of one request are its replicas'. draining: no new requests are taken."""

    config: ServerConfig
    fleet: Fleet
    session: aiohttp.ClientSession
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    figures: Figures = field(init=False)
    bodies: Bodies = field(init=False)
    sessions: Sessions = field(default_factory=Sessions)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.config.max_body_bytes or _BODY_BYTES)
        self.figures = Figures(self.fleet.models, self._gauges)

    def set_models(self, models: tuple[str, ...]) -> None:
        self.fleet.set_models(models)
        self.figures.set_models(models)

    def _gauges(self, model: str) -> dict[str, float]:
        known, router = self.fleet.replicas(model), self.fleet.router(model)
        return {
            "replicas": len(known),
            "replicas_ready": len(self.fleet.ready(model)),
            "queued_tokens": sum(router.queued_tokens(one.name) for one in known),
        }

    async def figures_of(self, replica: Record) -> tuple[str, str | None]:
        """Its name, and what it says; None where that takes too long."""
        headers = {"Authorization": f"Bearer {replica.key}"}
        try:
            async with (
                asyncio.timeout(_FIGURES_S),
                self.session.get(f"{replica.url}/metrics", headers=headers) as found,
            ):
                return replica.name, await found.text() if found.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError):
            return replica.name, None

    def check_open(self) -> None:
        """Raises Refusal where nothing new is begun."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", "ask another one", retry_after_s=5)

    def model_of(self, body: Any) -> str:
        """Raises Refusal where it names none that there is."""
        self.check_open()
        name = body.get("model") if isinstance(body, dict) else None
        served = ", ".join(self.fleet.models)
        if name is None and isinstance(body, dict) and len(self.fleet.models) > 1:
            raise Refusal(400, "model is missing", f"give one of {served}", param="model")
        if name is None:
            return self.fleet.models[0]
        if name not in self.fleet.models:
            shown = name[:200] if isinstance(name, str) else name
            raise Refusal(
                404, f"there is no model {shown!r}", f"here is {served}", param="model", code="model_not_found"
            )
        return str(name)
