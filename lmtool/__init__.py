"""lmtool: compress, run and serve language models over one inference engine.

Importing the package costs nothing: the names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lmtool.config import EngineConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
    from lmtool.engine.pipeline import Pipeline, pipeline
    from lmtool.engine.response import Response

_LAZY = {
    "EngineConfig": "lmtool.config",
    "PytorchEngineConfig": "lmtool.config",
    "TurbomindEngineConfig": "lmtool.config",
    "GenerationConfig": "lmtool.config",
    "Pipeline": "lmtool.engine.pipeline",
    "Response": "lmtool.engine.response",
    "pipeline": "lmtool.engine.pipeline",
}

__all__ = [
    "EngineConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "TurbomindEngineConfig",
    "__version__",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lmtool' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
