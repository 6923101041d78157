"""Which implementation serves an op: Triton on CUDA, plain torch elsewhere and where Triton's kernels cannot run.

Falling back on a GPU is never silent: each reason is logged once. ``with force("reference"):`` serves tests and
comparisons; nothing else overrides the choice. Knows the limits of the kernels, not what they compute.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lmtool.kernels.triton.precompile import Precompilation

_log = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("forced_kernels", default=None)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# one program holds whole heads in registers
_MAX_HEAD_DIM = 256
_AMPERE = (8, 0)


def refusal(capability: tuple[int, int], dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Why the Triton kernels do not take this on such a card; None: they do. ``head_dim`` 0: the op has no heads."""
    if dtype not in _DTYPES:
        return f"{_name(dtype)} is not among the kernels' types ({', '.join(map(_name, _DTYPES))})"
    if dtype == torch.bfloat16 and capability < _AMPERE:
        return f"compute capability {capability[0]}.{capability[1]} does not multiply bfloat16 (use float16)"
    if head_dim > _MAX_HEAD_DIM:
        return f"heads of {head_dim} are wider than the kernels' {_MAX_HEAD_DIM}"
    return None


def implementation(op: str, device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = 0) -> ModuleType:
    """The module that holds ``op``'s family ('norm', 'linear', …) for tensors like these."""
    return _module(_forced.get() or _kind(device, dtype, head_dim), op)


def is_capturable(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a model's whole step can be a CUDA graph: every op runs as a kernel and none waits for the GPU."""
    return device.type == "cuda" and (_forced.get() or _kind(device, dtype, head_dim)) == "triton"


def compile_ahead(
    rehearse: Callable[[], None], device: torch.device, dtype: torch.dtype, head_dim: int
) -> "Precompilation | None":
    """Begin to compile, in the background, what ``rehearse`` launches on tensors of the meta device.

    None where the steps of such a model are not kernels alone: there is nothing that could be compiled ahead.
    """
    if not is_capturable(device, dtype, head_dim):
        return None
    from lmtool.kernels.triton.precompile import Precompilation

    def forced() -> None:
        with force("triton"):
            rehearse()

    with torch.cuda.device(device):
        return Precompilation(forced)


@contextmanager
def force(kind: str) -> Iterator[None]:
    """Serve every op from ``kind`` ('reference' or 'triton') inside the block."""
    token = _forced.set(kind)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _module(kind: str, op: str) -> ModuleType:
    if kind == "triton":
        # products and sums stay fused: Triton 3.9 warns at each compilation where nobody says so, 3.10 is to stop
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return import_module(f"lmtool.kernels.{kind}.{op}")


@cache
def _kind(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return "reference"
    if not _has_triton():
        _notice("triton cannot be imported", "run pip install '.[gpu]' in lmtool's folder")
        return "reference"
    reason = refusal(torch.cuda.get_device_capability(device), dtype, head_dim)
    if reason is None:
        return "triton"
    _notice(reason)
    return "reference"


@cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


@cache
def _notice(reason: str, fix: str = "") -> None:
    """Once for each reason, however many ops and layers ask."""
    _log.warning("%s: what needs it runs in plain torch, slower%s", reason, f"; {fix}" if fix else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
