"""For every test: kernels are interpreted unless TRITON_INTERPRET=0, one seed, the same examples; without a GPU, no
`gpu` tests."""

import logging
import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")
# a shell ignores it in what it does not wait for, and so would all children
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("hypothesis") is not None:  # a machine that is there for its card may have pytest only
    from hypothesis import HealthCheck, settings

    # the same examples in every run, however slow the machine is; --hypothesis-profile=default looks for others
    settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")
if os.environ["TRITON_INTERPRET"] == "1":
    from tests.interpreter import patch_once_a_launch

    patch_once_a_launch()

_SEED = 20261121


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that start a Ray one after the other: two at once are more processes than two cores can carry."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/cluster" if nodeid.startswith("tests/cluster/") else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files that take long first: the last one that is begun is what one process does while the others have ended
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(_SEED)


@pytest.fixture(autouse=True)
def _logging() -> None:
    """As before any command line: one that ran in this process has set it up, and caplog would hear nothing."""
    logger = logging.getLogger("lmtool")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if made.is_floating_point():
            return made.fill_(torch.nan)
        return made if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).max)

    return make_poisoned


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like give NaN (integers: the largest), so that an unwritten output is seen."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
