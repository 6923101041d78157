"""Which implementation serves an op: Triton on CUDA, plain torch elsewhere. Knows no op by name.

``with force("reference"):`` serves tests and comparisons; nothing else overrides the choice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

_forced: ContextVar[str | None] = ContextVar("forced_kernels", default=None)


@cache
def _module(kind: str, op: str) -> ModuleType:
    return import_module(f"lmtool.kernels.{kind}.{op}")


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module that holds ``op``'s family ('norm', 'linear', …) for tensors on ``device``."""
    kind = _forced.get() or ("triton" if device.type == "cuda" else "reference")
    return _module(kind, op)


@contextmanager
def force(kind: str) -> Iterator[None]:
    """Serve every op from ``kind`` ('reference' or 'triton') inside the block."""
    token = _forced.set(kind)
    try:
        yield
    finally:
        _forced.reset(token)
