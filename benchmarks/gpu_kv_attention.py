"""Decode attention over quantized caches on a CUDA card: checked against plain torch, then timed beside float16's.

python -m benchmarks.gpu_kv_attention [--programs 528 1056]
Caches are random bytes, several of each in turn, so that each call's is not in the card's own cache.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_timing import call_us, ceilings
from lmtool.kernels import layout
from lmtool.kernels.kv_layout import KV_BLOCK, QuantizedKv, kv_block_bytes, kv_shapes
from lmtool.kernels.reference import kv as reference
from lmtool.kernels.triton import attention, kv_decode

CUDA = torch.device("cuda")
_BYTES_IN_TURN = 2 * 10**9  # of caches, forty times what the card keeps
SCHEMES = ("int8", "k8v4", "int4", "static")
# name: (query heads, key/value heads, head dim, lengths)
_STEP = (8000 - 100) // 31
MIXED = [length for length in range(100, 8001, _STEP) for _ in range(2)]
SHAPES: dict[str, tuple[int, int, int, list[int]]] = {
    "llama3-8b 16 x 8k": (32, 8, 128, [8192] * 16),
    "llama3-8b 64 x 8k": (32, 8, 128, [8192] * 64),
    "llama2-7b 8 x 8k": (32, 32, 128, [8192] * 8),
    "llama2-7b 200 x 450": (32, 32, 128, [450] * 200),
    "llama3-8b 1 x 8k": (32, 8, 128, [8192]),
    "llama3-8b 64 x 256": (32, 8, 128, [256] * 64),
    "llama3-8b mixed 100...8k": (32, 8, 128, MIXED),
    "llama3-8b the same, even": (32, 8, 128, [sum(MIXED) // len(MIXED)] * len(MIXED)),
}
CHECKS = [
    ([5000, 1, 0, 300, 64, 2047], 32, 8, 128, 0),
    ([257] * 9, 14, 2, 64, 0),
    ([1000, 100], 12, 12, 96, 200),
    ([3001], 48, 4, 80, 0),
]


def random_cache(scheme: str, hkv: int, num_blocks: int, d: int) -> QuantizedKv:
    shapes = kv_shapes(scheme, hkv, num_blocks, d)
    k, v = (torch.randint(0, 256, shapes[name], dtype=torch.uint8, device=CUDA) for name in ("k", "v"))
    unit = 15 if scheme == "int4" else 255
    metas = []
    for name, levels in (("k_meta", unit), ("v_meta", 15 if scheme in ("int4", "k8v4") else 255)):
        of_channels = scheme == "static" or (scheme == "int4" and name == "k_meta")
        scale = (torch.rand(shapes[name], device=CUDA) + 0.5) * 4 / levels
        low = -2 - torch.rand(shapes[name], device=CUDA)
        is_scale = torch.arange(2, device=CUDA) == 0
        metas.append(torch.where(is_scale[:, None] if of_channels else is_scale, scale, low).half())
    return QuantizedKv(k, v, *metas, d, scheme)


def tables_of(lengths: list[int]) -> tuple[Tensor, Tensor, int]:
    """(block tables, lengths, blocks in all), scattered."""
    counts = [-(-length // KV_BLOCK) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).int()
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for i, part in enumerate(order.split(counts)):
        tables[i, : counts[i]] = part
    return tables.to(CUDA), torch.tensor(lengths, dtype=torch.int32, device=CUDA), sum(counts) + 1


def check() -> None:
    for scheme in SCHEMES:
        for dtype in (torch.float16, torch.bfloat16):
            errors = []
            for lengths, hq, hkv, d, window in CHECKS:
                tables, lens, blocks = tables_of(lengths)
                cache = random_cache(scheme, hkv, blocks, d)
                opened = random_cache("int8", hkv, len(lengths) + 1, d) if scheme == "int4" else None
                places = torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=CUDA) if opened else None
                q = torch.randn(len(lengths), hq, d, device=CUDA).to(dtype)
                rest = (tables, lens, d**-0.5, window, None, opened, places)
                out = kv_decode.kv_attention_decode(q, cache, *rest).float()
                wanted = reference.kv_attention_decode(q.float(), cache, *rest)
                errors.append(float((out - wanted).norm() / wanted.norm()))
            print(f"check {scheme} {dtype}: relative error", " ".join(f"{error:.1e}" for error in errors), flush=True)


def calls_of(name: str, scheme: str, items: int) -> tuple[Callable[[int], object], int, int]:
    """(one call, caches in turn, bytes it must read) for a shape, 'fp16' being the cache that is not quantized."""
    hq, hkv, d, lengths = SHAPES[name]
    layout._TARGET_PROGRAMS = items
    tables, lens, blocks = tables_of(lengths)
    plan = attention.plan_decode(lens, hkv)
    q = torch.randn(len(lengths), hq, d, device=CUDA, dtype=torch.float16)
    block_bytes = hkv * d * KV_BLOCK * 4 if scheme == "fp16" else kv_block_bytes(scheme, hkv, d)
    copies = max(2, min(16, _BYTES_IN_TURN // (blocks * block_bytes)))
    read = sum(lengths) * block_bytes // KV_BLOCK
    if scheme == "fp16":
        halves = [
            tuple(torch.randn(hkv, blocks, KV_BLOCK, d, device=CUDA, dtype=torch.float16) for _ in range(2))
            for _ in range(copies)
        ]
        return lambda i: attention.attention_decode(q, *halves[i % copies], tables, lens, 0.1, 0, plan), copies, read
    caches = [random_cache(scheme, hkv, blocks, d) for _ in range(copies)]
    opened = random_cache("int8", hkv, len(lengths) + 1, d) if scheme == "int4" else None
    places = torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=CUDA) if opened else None
    return (
        lambda i: kv_decode.kv_attention_decode(q, caches[i % copies], tables, lens, 0.1, 0, plan, opened, places),
        copies,
        read,
    )


def timed(name: str, scheme: str, read_rate: float, items: int) -> tuple[float, float]:
    """(µs, share of the time in which the card could read as much)."""
    call, copies, read = calls_of(name, scheme, items)
    time_us = call_us(call, 2 * copies)
    torch.cuda.empty_cache()
    return time_us, read / read_rate / 1e6 / time_us


def table(read_rate: float, programs: list[int]) -> None:
    for name in SHAPES:
        for items in programs:
            fp16, share = timed(name, "fp16", read_rate, items)
            text = [f"fp16 {fp16:.1f} ({share:.0%})"]
            for scheme in SCHEMES:
                time_us, share = timed(name, scheme, read_rate, items)
                text.append(f"{scheme} {time_us:.1f} {time_us / fp16:.2f}x ({share:.0%})")
            print(f"{name:25} {items:5}", " | ".join(text), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--programs", type=int, nargs="*", default=[layout._TARGET_PROGRAMS], help="that the work list is made for"
    )
    programs = parser.parse_args().programs
    limits = ceilings()
    print({name: round(value, 2) for name, value in limits.items()}, flush=True)
    check()
    table(limits["read"], programs)


if __name__ == "__main__":
    main()
