"""Every kernel's launch configurations side by side on a CUDA card: the figures behind `kernels/triton/tuning.py`.

python -m benchmarks.gpu_kernels [linear] [attention] [prefill] [sampling]
Kernels are compiled first, in parallel processes, into Triton's cache.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_timing import call_us, ceilings
from lmtool import kernels
from lmtool.kernels import layout
from lmtool.kernels.triton import attention, tuning

COPIES = 16
EPS = 1e-5
# op, out features, in features
LINEARS = [
    ("norm_linear", 6144, 4096),
    ("add_linear_", 4096, 4096),
    ("norm_linear_silu", 14336, 4096),
    ("add_linear_", 4096, 14336),
    ("norm_linear", 128256, 4096),
    ("norm_linear", 4096, 2048),
    ("add_linear_", 2048, 2048),
    ("norm_linear_silu", 8192, 2048),
    ("add_linear_", 2048, 8192),
    ("norm_linear", 92544, 2048),
]
ROWS = [
    tuning.RowConfig(block_n, block_k, warps)
    for block_n, block_k, warps in [
        (1, 2048, 2), (1, 2048, 4), (2, 2048, 4), (4, 2048, 4), (8, 2048, 4), (2, 2048, 2), (4, 2048, 8),
        (2, 4096, 4), (4, 4096, 8), (2, 4096, 8), (8, 4096, 8), (1, 4096, 4),
        (4, 1024, 4), (8, 1024, 4), (4, 1024, 2), (2, 1024, 1), (4, 512, 2), (8, 512, 4),
        (1, 8192, 4), (2, 8192, 4), (2, 8192, 8), (4, 8192, 8), (1, 8192, 8),
        (1, 16384, 8), (2, 16384, 8), (1, 16384, 4), (2, 16384, 16),
    ]
]  # fmt: skip
TILES = [
    tuning.TileConfig(block_n, block_k, 4, stages, True, split)
    for block_n, block_k, stages in [(64, 128, 4), (64, 128, 6), (64, 64, 8), (64, 256, 3), (128, 128, 3), (128, 64, 5)]
    for split in (1, 2, 3, 4, 6, 8)
]
TILE_ROWS = [4, 16, 32]


def arguments(op: str, num_rows: int, n: int, k: int, copies: int) -> Callable[[int], Tensor]:
    """call(i): the op on the i-th copy of its weights."""

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.float16).normal_(0, 0.02)

    x, residual, norm_weight = random(num_rows, k), random(num_rows, n), random(k)
    weights = [random(2 * n if op == "norm_linear_silu" else n, k) for _ in range(copies)]
    call = getattr(kernels, op)
    if op == "add_linear_":
        return lambda i: call(residual, x, weights[i % copies])
    return lambda i: call(x, norm_weight, EPS, weights[i % copies])


def use(config: tuple[int, ...] | None) -> None:
    """The config for the next launches; None: the library's product."""
    tuning.max_rows = lambda *_, **__: 0 if config is None else 64
    tuning.row_config = tuning.tile_config = lambda *_, **__: config


def linear_cases() -> Iterator[tuple[str, int, int, int, tuple[int, ...]]]:
    for op, n, k in LINEARS:
        for config in ROWS:
            if config.block_k < 2 * k:
                yield op, n, k, 1, config
        for config in TILES:
            for num_rows in TILE_ROWS:
                if num_rows <= 16 or config.block_k <= 128:
                    yield op, n, k, num_rows, config


def compile_share(share: int, shares: int) -> None:
    cases = [case for case in linear_cases() if case[3] != 4]  # 8 rows run the same kernels
    previous, call = None, None
    for op, n, k, num_rows, config in cases[share::shares]:
        use(config)
        if previous != (op, n, k, num_rows):
            previous, call = (op, n, k, num_rows), arguments(op, num_rows, n, k, 1)
        try:
            call(0)
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, most likely: told again where it is timed
            if "out of resource" not in str(error):
                print(op, n, k, num_rows, config, repr(error)[:300], flush=True)


def compile_all() -> None:
    shares = max(1, (os.cpu_count() or 1) - 1)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compile_share, args=(i, shares)) for i in range(shares)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def time_linear(limits: dict[str, float]) -> None:
    for op, n, k in LINEARS:
        weight_bytes = 2 * k * (2 * n if op == "norm_linear_silu" else n)
        copies = max(3, min(COPIES, 4 * 10**9 // weight_bytes))
        limit = weight_bytes / limits["read"] / 1e6
        for num_rows in [1, *TILE_ROWS]:
            call = arguments(op, num_rows, n, k, copies)
            use(None)
            library = call_us(call, 2 * copies)
            found = []
            for case in linear_cases():
                if case[:4] != (op, n, k, num_rows):
                    continue
                use(case[4])
                try:
                    found.append((call_us(call, 2 * copies), tuple(case[4])))
                except Exception as error:
                    if "out of resource" not in str(error):
                        print("failed:", case, repr(error)[:200])
            found.sort()
            best = "  ".join(f"{time:.1f} {config}" for time, config in found[:5])
            worst = f"{found[-1][0]:.1f} {found[-1][1]}"
            print(
                f"{op} {n}x{k} M={num_rows}: limit {limit:.1f} library {library:.1f} | {best} | worst {worst}",
                flush=True,
            )
            del call
            torch.cuda.empty_cache()


def random_cache(hkv: int, d: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(hkv, num_blocks, 64, d, device="cuda", dtype=torch.float16) for _ in range(2))
    return k, v


def time_decode(limits: dict[str, float]) -> None:
    configs = [
        tuning.AttentionConfig(16, block_t, warps, stages)
        for block_t, warps, stages in [
            (64, 4, 1),
            (64, 4, 2),
            (64, 4, 3),
            (64, 4, 4),
            (64, 4, 5),
            (32, 4, 2),
            (32, 2, 4),
            (64, 2, 3),
        ]
    ]
    hkv, d = 8, 128
    for hq in (32,):
        for lengths in ([256], [256] * 4, [256] * 16, [256] * 64, [4096], [8192] * 16, [100, 8000, 300, 2000] * 16):
            batch, blocks = len(lengths), sum(-(-n // 64) for n in lengths)
            copies = max(2, min(16, 2 * 10**9 // (blocks * 64 * hkv * d * 4)))
            caches = [random_cache(hkv, d, blocks + 1) for _ in range(copies)]
            tables = torch.zeros(batch, 160, dtype=torch.int32)
            order = (torch.randperm(blocks) + 1).tolist()
            for i, n in enumerate(lengths):
                tables[i, : -(-n // 64)] = torch.tensor([order.pop() for _ in range(-(-n // 64))], dtype=torch.int32)
            tables, seq_lens = tables.cuda(), torch.tensor(lengths, dtype=torch.int32, device="cuda")
            q = torch.randn(batch, hq, d, device="cuda", dtype=torch.float16)
            found = []
            for config, target in itertools.product(configs, (132, 264, 528)):
                layout._TARGET_PROGRAMS = target
                plan = attention.plan_decode(seq_lens, hkv)
                tuning.decode_config = lambda *_, config=config, **__: config
                call = lambda i: attention.attention_decode(q, *caches[i % copies], tables, seq_lens, 0.1, 0, plan)  # noqa: E731
                found.append((call_us(call, 2 * copies), (*config, target)))
            found.sort()
            del found[6:]
            limit = sum(lengths) * hkv * d * 4 / limits["read"] / 1e6
            text = "  ".join(f"{time:.1f} {config}" for time, config in found)
            print(f"decode hq={hq} B={batch} tokens={sum(lengths)}: limit {limit:.1f} | {text}", flush=True)
            caches.clear()
            torch.cuda.empty_cache()
    seq_lens = torch.full((256,), 256, dtype=torch.int32, device="cuda")
    print(f"plan_decode B=256: {call_us(lambda i: attention.plan_decode(seq_lens, 8), 20):.1f} us")


def time_prefill(limits: dict[str, float]) -> None:
    configs = [
        tuning.AttentionConfig(block_r, block_t, warps, stages)
        for block_r, block_t, warps, stages in [
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 3),
            (256, 64, 8, 2),
        ]
    ]  # fmt: skip
    hq, hkv, d = 32, 8, 128
    for prefix, chunk in ((0, 512), (0, 2048), (0, 8192), (6144, 2048)):
        length = prefix + chunk
        caches = [random_cache(hkv, d, length // 64 + 1) for _ in range(4)]
        table = (torch.randperm(length // 64, device="cuda").int() + 1)[None]
        seq_lens, bounds = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([length], [0, chunk]))
        q = torch.randn(chunk, hq, d, device="cuda", dtype=torch.float16)
        flops = 4 * hq * d * (chunk * prefix + chunk * chunk / 2)
        found = []
        for config in configs:
            tuning.prefill_config = lambda *_, config=config, **__: config
            call = lambda i: attention.attention_prefill(q, *caches[i % 4], table, bounds, seq_lens, chunk, 0.1)  # noqa: E731
            try:
                found.append((call_us(call, 4), tuple(config)))
            except Exception as error:
                print("failed:", config, repr(error)[:100])
        found.sort()
        text = "  ".join(f"{time:.0f} ({flops / time / 1e6:.0f} TFLOP/s) {config}" for time, config in found)
        print(f"prefill prefix={prefix} chunk={chunk}: limit {flops / limits['matmul'] / 1e6:.0f} | {text}", flush=True)
    k, v = (torch.randn(1, hkv, 8192, d, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(1, hq, 8192, d, device="cuda", dtype=torch.float16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    time = call_us(lambda i: sdpa(q, k, v, is_causal=True, enable_gqa=True), 4)
    print(f"torch sdpa 8192: {time:.0f} us ({4 * hq * d * 8192**2 / 2 / time / 1e6:.0f} TFLOP/s)")


def time_sampling(limits: dict[str, float]) -> None:
    vocab = 128256
    for batch in (1, 16, 256):
        logits = torch.randn(batch, vocab, device="cuda") * 2.5
        for label, (t, k, p, m) in {
            "greedy": (0.0, 0, 1.0, 0.0),
            "temperature": (0.8, 0, 1.0, 0.0),
            "top-k 40, top-p 0.8": (0.8, 40, 0.8, 0.0),
            "top-p 0.95": (1.0, 0, 0.95, 0.0),
            "min-p 0.05": (1.0, 0, 1.0, 0.05),
        }.items():
            full = [torch.full((batch,), value, device="cuda") for value in (t, float(k), p, m)]
            seeds = torch.arange(batch, device="cuda")
            settings = (full[0], full[1].int(), full[2], full[3], seeds, seeds)
            time = call_us(lambda i: kernels.sample(logits, *settings), 10)
            limit = batch * vocab * 4 / limits["read"] / 1e6
            print(f"sample B={batch} {label}: {time:.1f} us, one pass {limit:.1f}", flush=True)


PARTS = {"linear": time_linear, "decode": time_decode, "prefill": time_prefill, "sampling": time_sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parts = parser.parse_args().parts
    if "linear" in parts:
        compile_all()
    limits = ceilings()
    print({name: round(value, 2) for name, value in limits.items()}, flush=True)
    original = vars(tuning).copy()
    for part in parts:
        PARTS[part](limits)
        vars(tuning).update(original)


if __name__ == "__main__":
    main()
