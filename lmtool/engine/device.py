"""What to run on: which device and dtype, what memory is free there, and how a shortage of it is said.

Everything that a card cannot do is refused here, before anything is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lmtool.errors import ConfigError, DeviceError, MemoryShortError
from lmtool.kernels.cpu import multiplies_bfloat16
from lmtool.models.config import ModelConfig

# version 2 and version 1: the most, what is used
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_OLDEST_CARD = (7, 5)
# what torch, CUDA's libraries and Triton say, each in an error of its own
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is {name!r}", "give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"--device {name} is not supported", "give cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU or driver"
        )
        raise DeviceError(f"--device {name}: {why}", "use --device cpu, or see `lmtool check_env`")
    with memory_short(f"--device {name} has no memory for as much as a CUDA context", "close what else uses the card"):
        return torch.device("cuda", _check_card(name, device.index))


def _check_card(name: str, index: int | None) -> int:
    index = index if index is not None else torch.cuda.current_device()
    count = torch.cuda.device_count()
    if index >= count:
        there = "there is 1 GPU" if count == 1 else f"there are {count} GPUs"
        raise DeviceError(f"--device {name}: {there}", "count from cuda:0")
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CARD:
        raise DeviceError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}",
            "7.5 (Turing) or newer is needed; use --device cpu",
        )
    return index


def choose_dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """'auto': the checkpoint's half precision on a GPU; on a CPU bfloat16 where it multiplies it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise DeviceError("--dtype bfloat16 needs compute capability 8.0 or newer", "use --dtype float16")
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    bfloat16 = model.dtype == "bfloat16" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if bfloat16 else torch.float16


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on ``device`` can have now."""
    if device.type == "cuda":
        with memory_short(f"{device} has no memory for as much as a CUDA context", "close what else uses the card"):
            torch.cuda.empty_cache()  # what torch keeps for its next allocation is as good as free
            return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) * 1024, *_container_free_bytes()])
    raise DeviceError("/proc/meminfo does not say how much memory is free", "give --cache-gb")


def _container_free_bytes() -> list[int]:
    """What a container's limit leaves, where there is one; files that were only read may be dropped."""
    left = []
    for limit, used in _CGROUP_FILES:
        try:
            most = (_CGROUP / limit).read_text().strip()
            stat = dict(line.split() for line in (_CGROUP / used).with_name("memory.stat").read_text().splitlines())
            taken = int((_CGROUP / used).read_text()) - int(stat.get("inactive_file", 0))
        except (OSError, ValueError):
            continue
        if most.isdigit():
            left.append(max(0, int(most) - taken))
    return left


@contextmanager
def memory_short(cause: str, fix: str) -> Iterator[None]:
    """Whatever says inside that the device's memory is not enough is said in our words."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _OUT_OF_MEMORY) and not isinstance(
            error, torch.cuda.OutOfMemoryError
        ):
            raise
        raise MemoryShortError(cause, fix) from None
