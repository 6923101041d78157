"""A folder with pickle weights into one with safetensors, the pickles opened by a process that can reach nothing."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lmtool.checkpoint.manifest import PICKLE_SUFFIXES
from lmtool.checkpoint.reader import read_json
from lmtool.checkpoint.tensor_file import TensorFile
from lmtool.checkpoint.workspace_manifest import check_tensor_name
from lmtool.child import module_command, module_environment
from lmtool.convert.place import temporary_folder
from lmtool.convert.progress import Progress
from lmtool.errors import CheckpointError, DeviceError, InputError

_INDEX = "pytorch_model.bin.index.json"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_MOST_LINE = 1 << 16
_MOST_TENSORS = 20_000
# beside the weights: what training leaves, and what is no weights at all
_NOT_WEIGHTS = re.compile(r"^(optimizer|scheduler|training_args|rng_state|scaler)")
_COPIED = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")


def pickle_files(folder: Path) -> list[Path]:
    """The files with weights of a folder that has no safetensors: those of its index, if it has one."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return []
    if (folder / _INDEX).exists():  # beside them may lie what is in them, too: LLaVA's mm_projector.bin
        return _indexed(folder)
    found = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    return [file for file in found if not _NOT_WEIGHTS.match(file.name)]


def _indexed(folder: Path) -> list[Path]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / _INDEX} names no files of its folder", "download the model again")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}",
            "download the model again",
        )
    return [folder / name for name in names]


@contextmanager
def as_safetensors(
    source: Path, files: list[Path], destination: Path, progress: Progress, what: str = "unpickled"
) -> Iterator[Path]:
    """A folder next to ``destination`` with what ``source`` holds, for as long as the block lasts. what: names it.

    A file is read whole: memory for the largest. Raises CheckpointError for a pickle of anything but tensors.
    """
    stems = [file.stem for file in files]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise CheckpointError(f"{source} holds several files named {twice}", "leave the files of one model in it")
    with temporary_folder(destination, what) as folder:
        for done, file in enumerate(files):
            progress("reading pickle files", done, len(files))
            with TensorFile(folder / f"{file.stem}.safetensors", _MOST_TENSORS) as written:
                for name, tensor in _tensors(file):
                    written.add(name, tensor)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)
        try:
            yield folder
        except InputError as error:  # the folder it names is gone when that is read
            raise type(error)(error.cause.replace(str(folder), str(source)), error.fix) from error


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    read_end, write_end = os.pipe()
    with file.open("rb") as source, os.fdopen(read_end, "rb") as pipe:
        child = subprocess.Popen(
            [*module_command("lmtool.convert.unpickle_child"), str(source.fileno()), str(write_end)],
            pass_fds=(source.fileno(), write_end),
            env={"PATH": os.defpath, "PYTHONPATH": module_environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(write_end)
        try:
            yield from _received(file, pipe)
        finally:
            child.kill()
            child.wait()


def _received(file: Path, pipe: IO[bytes]) -> Iterator[tuple[str, Tensor]]:
    """Nothing that comes through the pipe is believed before it is checked."""
    while True:
        length = int.from_bytes(_exactly(file, pipe, 4), "little")
        if length > _MOST_LINE:
            raise _not_understood(file)
        try:
            line = json.loads(_exactly(file, pipe, length))
        except ValueError:
            raise _not_understood(file) from None
        if not isinstance(line, dict):
            raise _not_understood(file)
        if line.get("end"):
            return
        if "machine" in line:
            raise DeviceError(*line["machine"])
        if "unreadable" in line:
            raise CheckpointError(f"{file} cannot be read: {line['unreadable']}", "is the file whole?")
        if "error" in line:
            raise CheckpointError(f"{file} holds more than tensors: {line['error']}", "do not trust it")
        yield _tensor(file, pipe, line)


def _tensor(file: Path, pipe: IO[bytes], line: dict[str, Any]) -> tuple[str, Tensor]:
    name, dtype, shape = line.get("name"), line.get("dtype"), line.get("shape")
    if not isinstance(name, str) or not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
        raise _not_understood(file)
    if dtype not in _DTYPES or min(shape, default=0) < 0:
        raise CheckpointError(f"{file}: {name} holds {dtype} numbers", "only dense tensors of numbers are read")
    check_tensor_name(file, name)
    kind: torch.dtype = getattr(torch, dtype)
    count = prod(shape)
    if count == 0:
        return name, torch.empty(shape, dtype=kind)
    data = bytearray(_exactly(file, pipe, count * kind.itemsize))
    return name, torch.frombuffer(data, dtype=kind).view(shape)


def _exactly(file: Path, pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise CheckpointError(f"{file} could not be read: the process that opened it ended", "is the file whole?")
    return data


def _not_understood(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: what its reader sent is not understood", "do not trust it")
