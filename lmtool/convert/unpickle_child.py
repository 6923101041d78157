"""The process in which a pickle file is opened: fenced off first, it sends the tensors to its parent through a pipe.

Started by `unpickle` as ``python -m lmtool.convert.unpickle_child SOURCE_FD PIPE_FD``. What it sends is data: for each
tensor the length of a JSON line, the line, the bytes; last a line that says so, or an error.
"""

import io
import json
import os
import pickle
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from lmtool.checkpoint.tensor_file import tensor_bytes
from lmtool.convert.fence import fence
from lmtool.errors import DeviceError

_NESTED = ("state_dict", "model")  # where training code puts the weights


def main() -> None:
    source_fd, pipe_fd = (int(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    with os.fdopen(pipe_fd, "wb") as pipe:
        try:
            _import_what_loading_needs()
            fence()
            with os.fdopen(source_fd, "rb") as source:
                _send_all(pipe, torch.load(source, map_location="cpu", weights_only=True))
            _send(pipe, {"end": True})
        except DeviceError as error:
            _send(pipe, {"machine": [error.cause, error.fix]})
        except (pickle.UnpicklingError, TypeError) as error:
            _send(pipe, {"error": _one_line(error)})
        except Exception as error:
            _send(pipe, {"unreadable": f"{type(error).__name__}: {_one_line(error)}"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _import_what_loading_needs() -> None:
    """Behind the fence no module can be imported: both of torch's formats are loaded once before."""
    for zipped in (True, False):
        some = {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2, 2).t()}
        file = io.BytesIO()
        torch.save(some, file, _use_new_zipfile_serialization=zipped)
        file.seek(0)
        for tensor in torch.load(file, map_location="cpu", weights_only=True).values():
            tensor_bytes(tensor)


def _send_all(pipe: BinaryIO, loaded: Any) -> None:
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__}, not tensors by name")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{str(name)[:60]!r} is a {type(tensor).__name__}, not a dense tensor")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # a few bytes that fill the memory
            raise TypeError(f"{name[:60]!r} repeats what is stored of it")
        dtype = str(tensor.dtype).removeprefix("torch.")
        _send(pipe, {"name": name, "dtype": dtype, "shape": list(tensor.shape)})
        pipe.write(tensor_bytes(tensor.detach()))


def _send(pipe: BinaryIO, line: dict[str, Any]) -> None:
    data = json.dumps(line).encode()
    pipe.write(len(data).to_bytes(4, "little") + data)
    pipe.flush()


if __name__ == "__main__":
    main()
