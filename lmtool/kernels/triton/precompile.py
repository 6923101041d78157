"""Kernels compiled ahead, many at a time: a rehearsal on tensors of the meta device says which.

The launchers themselves decide what is compiled, so no launch is described twice. A meta tensor has the dtype, the
shape and, by its offset, the alignment of the real one, and these are all that Triton specialises for. Knows no op.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lmtool.errors import DeviceError

_log = logging.getLogger(__name__)
_MAX_WORKERS = 16  # beyond, Python's lock is what they wait for

Variants = dict[tuple[str, str, str], tuple[JITFunction, str]]  # module, name, key → what `preload` takes
_collecting = Lock()


class Precompilation:
    """Finds out what ``rehearse`` launches, then compiles and loads it, all on threads of its own from now on.

    Triton lets go of Python's lock while LLVM works, and ptxas is a process: threads are enough, and what they
    compile is in this process's cache as well as on the disk. The device is the caller's current one.
    """

    def __init__(self, rehearse: Callable[[], None]) -> None:
        workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
        device = driver.active.get_current_device()
        self._pool = ThreadPoolExecutor(workers, "compile", _choose, (device,))
        # the disk's cache is addressed by a hash of Triton itself, half a gigabyte: every kernel would wait for it
        self._key = self._pool.submit(triton_key)
        self._begun = self._pool.submit(self._begin, rehearse)

    def _begin(self, rehearse: Callable[[], None]) -> dict[Future[None], str]:
        found = collect(rehearse)
        self._key.result()
        return {self._pool.submit(_compile, *variant): name for (_, name, _), variant in found.items()}

    def wait(self, progress: Callable[[int, int], None] | None = None) -> None:
        """progress: kernels done, kernels in all. Raises DeviceError where one cannot be compiled, OutOfMemoryError."""
        try:
            running = self._known()
            for i, future in enumerate(as_completed(running)):
                error = future.exception()
                if error is not None:
                    raise _refusal(running[future], error) from error
                if progress is not None:
                    progress(i + 1, len(running))
        finally:
            self.close()

    def _known(self) -> dict[Future[None], str]:
        try:
            return self._begun.result()
        except (NotImplementedError, RuntimeError) as error:  # an operation of torch's that has no meta form
            _log.warning("kernels are compiled one after the other, when first used: %s", error)
            return {}

    def close(self) -> None:
        """What has not begun is left out; what has is waited for. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def collect(rehearse: Callable[[], None]) -> Variants:
    """What the launches in ``rehearse``, all on meta tensors, would compile; nothing is compiled or launched."""
    variants: Variants = {}
    with _collecting, _compile_only(variants), _ShapesOnly():
        rehearse()
    return variants


def _meta(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _meta_like(like: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return _meta(like, like.shape, dtype)


class _ShapesOnly(TorchFunctionMode):
    """torch computes these shapes in Python that first imports a compiler: two seconds that loading would wait for."""

    _SHAPES: ClassVar[dict[Any, Callable[..., Tensor]]] = {
        torch.empty_like: _meta_like,
        torch.ones_like: _meta_like,
        Tensor.clamp_min: _meta_like,
        torch.cat: lambda parts: _meta(parts[0], (sum(map(len, parts)), *parts[0].shape[1:])),
        torch.nn.functional.embedding: lambda ids, table, **_: _meta(table, (*ids.shape, table.shape[1])),
        torch.nn.functional.linear: lambda x, weight, bias=None: _meta(x, (*x.shape[:-1], weight.shape[0])),
    }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self._SHAPES and _is_in_place(func):
            return args[0]
        return self._SHAPES.get(func, func)(*args, **(kwargs or {}))


def _is_in_place(func: Any) -> bool:
    """Tensor.add_ and its like; none of them changes a shape."""
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and getattr(Tensor, name, None) is func


def _refusal(kernel: str, error: BaseException) -> Exception:
    if "out of memory" in str(error):
        return torch.cuda.OutOfMemoryError(str(error))
    return DeviceError(
        f"{kernel} cannot be compiled for this card: {type(error).__name__}: {' '.join(str(error).split())[-200:]}",
        "Triton needs a C compiler (gcc) and a driver of its CUDA version: see `lmtool check_env`",
    )


@contextmanager
def _compile_only(variants: Variants) -> Iterator[None]:
    """Launches by this thread are noted instead of done; those by others go on as ever."""
    launch, hook, thread = JITFunction.run, knobs.runtime.jit_cache_hook, get_ident()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=warmup or get_ident() == thread, **kwargs)

    def note(*, key: str, fn: Any, compile: dict[str, Any], **others: Any) -> bool:  # noqa: A002  Triton's word
        if get_ident() != thread:
            return bool(hook and hook(key=key, fn=fn, compile=compile, **others))
        variants[fn.module, fn.name, key] = fn.jit_function, compile["specialization_data"]
        return True

    JITFunction.run, knobs.runtime.jit_cache_hook = run, note
    try:
        yield
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = launch, hook


def _choose(device: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(device)


def _compile(function: JITFunction, specialization: str) -> None:
    kernel = function.preload(specialization)
    kernel.run  # noqa: B018  asking for its launcher loads it onto the card
