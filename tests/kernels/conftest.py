"""For kernel tests: memory is poisoned, and tensors live where the kernels run."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    pass


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA when the kernels are compiled (TRITON_INTERPRET=0), else the CPU, where they are interpreted."""
    return torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
