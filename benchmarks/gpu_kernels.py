"""Attention's launch configurations side by side on a CUDA card: the figures behind the rules of `tuning.py`.

python -m benchmarks.gpu_kernels [decode] [prefill]
The matrix products' are searched by `lmtool bench kernels --tune`; every op's time is `lmtool bench kernels`'.
"""

import argparse
import itertools

import torch
from torch import Tensor

from benchmarks.gpu_timing import call_us, ceilings
from lmtool.kernels import layout
from lmtool.kernels.triton import attention, tuning


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


PARTS = {"decode": time_decode, "prefill": time_prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parts = parser.parse_args().parts
    limits = ceilings()
    print({name: round(value, 2) for name, value in limits.items()}, flush=True)
    original = vars(tuning).copy()
    for part in parts:
        PARTS[part](limits)
        vars(tuning).update(original)


if __name__ == "__main__":
    main()
