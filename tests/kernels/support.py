"""What kernel tests share: one tolerance per dtype, random tensors, and what each card's compiler made."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# relative and absolute; half precision leaves room for one rounding of the output and a different order of the sum
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}

# the interpreter multiplies bfloat16 wrongly (docs/log.md), so it is tried on a GPU only
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype=dtype, device=device)


def assert_close(actual: Tensor, expected: Tensor, *, loosen: float = 1.0) -> None:
    rtol, atol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol * loosen, atol=atol * loosen)


HOPPER = 90
OLDER = (75, 80, 86, 89)


def compiled(capability: int) -> list[dict[str, Any]]:
    """Every kernel compiled for one card, as tests/kernels/offline.py tells it."""
    cards = OLDER if capability in OLDER else (capability,)
    return [kernel for kernel in _compiled(cards) if kernel["capability"] == capability]


@functools.cache
def _compiled(cards: tuple[int, ...]) -> list[dict[str, Any]]:
    """One process for all of them (importing takes seconds), through Triton's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.offline", *map(str, cards)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
