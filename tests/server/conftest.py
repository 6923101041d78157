"""One server of a tiny model for all tests that do not need one of their own, and one of a tiny LLaVA."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtool import pipeline
from lmtool.config import EngineConfig
from lmtool.engine.pipeline import Pipeline
from tests.server.serving import Serving
from tests.server.support import llava_engine
from tests.tiny_llava import tiny_llava


@pytest.fixture(scope="session")
def serving() -> Iterator[Serving]:
    with Serving() as server:
        yield server


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    tiny_llava(path)
    return path


@pytest.fixture(scope="session")
def seeing(llava_folder) -> Iterator[Serving]:
    engine = llava_engine(llava_folder)
    with Serving(engine) as server:
        yield server
    engine.close()


@pytest.fixture(scope="session")
def pipe(llava_folder) -> Iterator[Pipeline]:
    config = EngineConfig(device="cpu", dtype="float32", session_len=1024, cache_gb=0.05)
    with pipeline(str(llava_folder), config) as made:
        yield made
