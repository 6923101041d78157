"""A whole decode step through the kernels' door as one CUDA graph, on random weights: what an engine could reach.

python -m benchmarks.gpu_chain [--shapes 1.8b 8b] [--batches 1 16 64 256] [--ablate]
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_timing import ceilings, graphed, replay_us
from lmtool import kernels
from lmtool.kernels.triton import launch

EPS, BLOCK_SIZE = 1e-5, 64
GOALS = {  # issue 3: tokens/s
    "1.8b": {1: 980, 16: 12_000, 64: 30_000, 256: 60_000},
    "8b": {1: 265, 16: 3_700, 64: 11_500, 256: 22_000},
}


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    inner: int
    vocab: int
    head_dim: int = 128


SHAPES = {
    "1.8b": Shape(24, 2048, 16, 8, 8192, 92544),
    "8b": Shape(32, 4096, 32, 8, 14336, 128256),
}


def random(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.float16).normal_(0, 0.02)


class Chain:
    """The decoder's step; `skip` leaves ops out to see what they cost."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.embedding, self.head = random(shape.vocab, shape.hidden), random(shape.vocab, shape.hidden)
        self.norm = torch.ones(shape.hidden, device="cuda", dtype=torch.float16)
        self.layers = [
            (
                random(width, shape.hidden),
                random(shape.hidden, shape.num_q_heads * shape.head_dim),
                random(2 * shape.inner, shape.hidden),
                random(shape.hidden, shape.inner),
            )
            for _ in range(shape.num_layers)
        ]
        self.cos_sin = torch.rand(8192, shape.head_dim, device="cuda")

    def prepare(self, batch: int, context: int, max_len: int = 4096) -> None:
        shape = self.shape
        num_blocks = batch * (context // BLOCK_SIZE + 1) + 1
        size = (shape.num_kv_heads, num_blocks, BLOCK_SIZE, shape.head_dim)
        self.caches = [(random(*size), random(*size)) for _ in range(shape.num_layers)]
        per_row = (num_blocks - 1) // batch
        tables = torch.zeros(batch, max_len // BLOCK_SIZE, dtype=torch.int32)
        tables[:, :per_row] = (torch.randperm(num_blocks - 1) + 1).view(batch, per_row)
        self.tables = tables.cuda()
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.positions = torch.full((batch,), context - 1, device="cuda")
        self.slots = self.tables[:, (context - 1) // BLOCK_SIZE].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.ids = torch.randint(shape.vocab, (batch,), device="cuda")
        zeros, ones = torch.zeros(batch, device="cuda"), torch.ones(batch, device="cuda")
        steps = torch.zeros(batch, dtype=torch.int64, device="cuda")
        self.sampling = (zeros, zeros.int(), ones, zeros, steps, steps)
        self.q = random(batch, shape.num_q_heads, shape.head_dim)

    def step(self, skip: frozenset[str] = frozenset()) -> None:
        batch, shape = self.ids.shape[0], self.shape
        x = torch.nn.functional.embedding(self.ids, self.embedding)
        cos_sin = self.cos_sin[self.positions]
        plan = kernels.plan_decode(self.seq_lens, shape.num_kv_heads)
        scale = shape.head_dim**-0.5
        for (qkv_w, out_w, gate_up_w, down_w), (k_cache, v_cache) in zip(self.layers, self.caches, strict=True):
            q = self.q
            if "linear" not in skip:
                qkv = kernels.norm_linear(x, self.norm, EPS, qkv_w)
                if "rope" not in skip:
                    q = kernels.rope_store(qkv, cos_sin, self.slots, k_cache, v_cache)
            if "attention" not in skip:
                q = kernels.attention_decode(q, k_cache, v_cache, self.tables, self.seq_lens, scale, 0, plan)
            if "linear" not in skip:
                kernels.add_linear_(x, q.view(batch, -1), out_w)
                inner = kernels.norm_linear_silu(x, self.norm, EPS, gate_up_w)
                kernels.add_linear_(x, inner, down_w)
        if "head" not in skip:
            logits = kernels.norm_linear(x, self.norm, EPS, self.head)
            self.ids.copy_(kernels.sample(logits, *self.sampling))

    def weight_bytes(self) -> int:
        return 2 * (self.head.numel() + sum(weight.numel() for layer in self.layers for weight in layer))

    def kv_bytes(self, batch: int, context: int) -> int:
        shape = self.shape
        return batch * context * 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim


def time_step(chain: Chain, *skip: str) -> float:
    graph = graphed(lambda: chain.step(frozenset(skip)))
    time_us = replay_us(graph)
    graph.reset()
    return time_us


def report(name: str, batches: list[int], context: int, limits: dict[str, float], *, ablate: bool) -> None:
    chain = Chain(SHAPES[name])
    for batch in batches:
        chain.prepare(batch, context)
        time_us = time_step(chain)
        floor_us = (chain.weight_bytes() + chain.kv_bytes(batch, context)) / limits["read"] / 1e6
        flops = 2 * batch * chain.weight_bytes() / 2
        floor_us = max(floor_us, flops / limits["matmul"] / 1e6 + chain.kv_bytes(batch, context) / limits["read"] / 1e6)
        goal = GOALS[name].get(batch, 0)
        print(
            f"{name} b{batch} ctx {context}: {time_us:7.0f} us  {batch / time_us * 1e6:8.0f} tok/s"
            f"  goal {goal}  limit {batch / floor_us * 1e6:8.0f} ({floor_us / time_us:4.0%})",
            flush=True,
        )
        if not ablate:
            continue
        for label, skip in {
            "no attention": ["attention"],
            "no rope, attention": ["attention", "rope"],
            "no linear": ["linear", "head"],
            "no head, sample": ["head"],
        }.items():
            print(f"    {label:20} {time_step(chain, *skip):7.0f} us")
        supports = launch.dependent_launch
        launch_off = {"PDL": False}
        patched = [module for module in _kernel_modules() if hasattr(module, "dependent_launch")]
        for module in patched:
            module.dependent_launch = lambda device: launch_off
        print(f"    {'no dependent launch':20} {time_step(chain):7.0f} us", flush=True)
        for module in patched:
            module.dependent_launch = supports


def _kernel_modules() -> list[object]:
    from lmtool.kernels.triton import activation, attention, linear, norm, rotary, sampling

    return [activation, attention, linear, norm, rotary, sampling]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--ablate", action="store_true")
    arguments = parser.parse_args()
    limits = ceilings()
    print({name: round(value, 2) for name, value in limits.items()})
    for name in arguments.shapes:
        report(name, arguments.batches, arguments.context, limits, ablate=arguments.ablate)


if __name__ == "__main__":
    main()
