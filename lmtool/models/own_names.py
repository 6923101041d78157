"""A workspace's names: the loader's own, with nothing to be stacked or moved."""

from lmtool.models import llama

NAMES: dict[str, tuple[str, ...]] = {ours: (ours,) for ours in llama.NAMES}
