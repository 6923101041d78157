"""What a rehearsal finds, on a machine without a card: `python -m tests.kernels.rehearsal` prints one JSON object.

In a process of its own, without TRITON_INTERPRET, under a driver that knows an H200's limits and launches nothing.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lmtool import kernels
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.kv_cache import BLOCK_SIZE, CachePlan
from lmtool.errors import LmtoolError
from lmtool.kernels.kv_layout import KvScheme
from lmtool.kernels.triton import attention, kv_decode, launch, linear, prefill, w4
from lmtool.kernels.triton.activation import silu_mul
from lmtool.kernels.triton.norm import rms_norm
from lmtool.kernels.triton.precompile import Precompilation, collect
from lmtool.models.random import random_decoder
from tests.support import TINY


class Card:
    """An NVIDIA driver as far as compiling needs one."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.error = ""
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}, load_binary=self._load)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launcher(*_: Any) -> None:
            raise AssertionError("something was launched")

        return launcher

    def _load(self, name: str, *_: Any) -> tuple[object, int, int, int, int]:
        if self.error:
            raise RuntimeError(self.error)
        self.loaded.append(name)
        return object(), 0, 0, 0, 1024


def keys_on(device: str) -> set[tuple[str, str, str]]:
    """What the steps of tiny half-precision engines on ``device`` would compile: of numbers, 4-bit codes, K/V codes."""
    schemes: tuple[KvScheme, ...] = ("int8", "int4")
    quantized = [_keys_on(device, None, scheme) for scheme in schemes]
    return _keys_on(device, None) | _keys_on(device, group_size=32) | set.union(*quantized)


def _keys_on(device: str, group_size: int | None, scheme: KvScheme | None = None) -> set[tuple[str, str, str]]:
    shape = TINY if group_size is None else replace(TINY, hidden_size=64, intermediate_size=96)
    decoder = random_decoder(
        shape, dtype=torch.float16, device=torch.device(device), num_positions=512, group_size=group_size
    )
    plan = CachePlan(
        num_blocks=8,
        block_size=BLOCK_SIZE,
        block_bytes=0,
        session_len=512,
        scheme=scheme,
        num_open_blocks=41 if scheme == "int4" else 0,
    )

    def rehearse() -> None:
        with kernels.force("triton"):
            DeviceRunner(decoder, plan, max_batch_size=40).rehearse(max_batched_tokens=300)

    return set(collect(rehearse))


def compile_three(told: list[tuple[int, int]]) -> None:
    def rehearse() -> None:
        x = torch.empty(4, 256, dtype=torch.float16, device="meta")
        rms_norm(x, x[0], 1e-5)
        rms_norm(x[:1], x[0], 1e-5)  # one row: another variant
        rms_norm(x[1:2], x[0], 1e-6)  # the same again
        silu_mul(x)

    Precompilation(rehearse).wait(lambda done, total: told.append((done, total)))
    assert not collect(rehearse)


def refusal(card: Card, error: str, width: int) -> list[str]:
    """What comes of a driver that does not take a kernel (one that was not compiled before)."""
    card.error = error
    compiling = Precompilation(lambda: silu_mul(torch.empty(4, width, dtype=torch.float16, device="meta")))
    try:
        compiling.wait()
    except (LmtoolError, torch.cuda.OutOfMemoryError) as caught:
        return [type(caught).__name__, str(caught)]
    return []


def main() -> None:
    card = Card()
    driver.set_active(card)
    started = time.perf_counter()
    on_meta = keys_on("meta")
    seconds = time.perf_counter() - started
    imported = sorted({"sympy", "torch._dynamo"} & sys.modules.keys())
    told: list[tuple[int, int]] = []
    compile_three(told)
    loaded = sorted(card.loaded)
    refused = refusal(card, "Triton Error [CUDA]: device kernel image is invalid", 512)
    no_room = refusal(card, "Triton Error [CUDA]: out of memory", 768)
    for module in (launch, linear, attention, kv_decode, prefill, w4):
        module.arch = lambda device: 90  # type: ignore[attr-defined]
    torch.empty = torch.zeros  # type: ignore[assignment]  nothing is computed: what is read back must be an index
    on_cpu = keys_on("cpu")
    print(
        json.dumps(
            {
                "num_found": len(on_meta),
                "kernels": sorted({name for _, name, _ in on_meta}),
                "only_meta": sorted(map(str, on_meta - on_cpu)),
                "only_cpu": sorted(map(str, on_cpu - on_meta)),
                "imported": imported,
                "seconds": seconds,
                "told": told,
                "loaded": loaded,
                "refused": refused,
                "no_room": no_room,
            }
        )
    )


if __name__ == "__main__":
    main()
