"""What a card does at best today, in the units of these scripts; how it is timed is `lmtool.bench.timing`'s."""

import torch

from lmtool.bench import limits
from lmtool.bench.timing import call_us, graphed, replay_us

__all__ = ["call_us", "ceilings", "graphed", "replay_us"]


def ceilings() -> dict[str, float]:
    """TB/s read and copied, TFLOP/s of a float16 product of random matrices."""
    found = limits.measure(torch.device("cuda"))
    rates = {"read": found.read_bytes_per_s, "copy": found.copy_bytes_per_s, "matmul": found.matmul_flops_per_s}
    return {name: rate / 1e12 for name, rate in rates.items()}
