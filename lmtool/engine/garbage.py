"""Python's garbage collector, held off where it would stand in the way. Knows nothing else."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """No pass of the collector inside. Thousands of tensors that are made and kept would set off whole ones."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
