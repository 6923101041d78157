"""`.state/` of a work dir: what is done, so that the same command goes on where it was killed, to the same bytes.

    fingerprint.json        the model, the text and the options; another command may not go on from here
    threads.json            how many threads the first run had
    hidden-00003.f32        hidden states in front of block 3, a mapped file: the page cache keeps what fits
    block-00002.safetensors tensors of block 2 as the model's files will hold them
    block-00002.json        its errors; written last, and so what says that the block is done

Does not know what is in the tensors.
"""

import json
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lmtool.checkpoint.reader import read_json
from lmtool.checkpoint.writer import write_json, write_tensors
from lmtool.errors import ConfigError

FOLDER = ".state"
_BYTES = {"F16": 2, "BF16": 2, "I32": 4}  # what a quantized block is made of


class State:
    def __init__(self, work_dir: Path, fingerprint: Mapping[str, Any], shape: tuple[int, ...], *, fresh: bool) -> None:
        """shape: of the hidden states, float32. Raises ConfigError where another command left its state."""
        self.folder = work_dir / FOLDER
        self._shape = shape
        if fresh:
            self.clear()
        written = self.folder / "fingerprint.json"
        if written.exists():
            refuse_difference(work_dir, fingerprint)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(written, fingerprint)

    def num_threads(self, available: int) -> int:
        """Of the run that began this state, this one if it does: how many share a sum decides the sum's last bits."""
        written = self.folder / "threads.json"
        if not written.exists():
            write_json(written, {"num_threads": available})
        return int(read_json(written)["num_threads"])

    @property
    def blocks_done(self) -> int:
        done = 0
        while (self.folder / f"block-{done:05d}.json").exists():
            done += 1
        return done

    def hidden(self, block: int) -> Tensor:
        """The hidden states in front of ``block``, mapped."""
        return self._map(self._hidden_file(block))

    def new_hidden(self, block: int) -> Tensor:
        """Room for those, not there before `keep_hidden` says so."""
        partial = self._hidden_file(block).with_suffix(".partial")
        partial.unlink(missing_ok=True)
        return self._map(partial)

    def keep_hidden(self, block: int) -> None:
        file = self._hidden_file(block)
        partial = file.with_suffix(".partial")
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(file)

    def has_hidden(self, block: int) -> bool:
        return self._hidden_file(block).exists()

    def commit(self, block: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """``block`` is done; what only it needed goes."""
        write_tensors(self.folder / f"block-{block:05d}.safetensors", tensors)
        write_json(self.folder / f"block-{block:05d}.json", report)
        self._hidden_file(block).unlink(missing_ok=True)

    def report(self, block: int) -> dict[str, Any]:
        return read_json(self.folder / f"block-{block:05d}.json")

    def sizes(self, block: int) -> dict[str, int]:
        """name → bytes of a done block's tensors."""
        with safe_open(self._tensors_file(block), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  safe_open is not iterable
            return {name: prod(part.get_shape()) * _BYTES[part.get_dtype()] for name, part in slices.items()}

    def tensor(self, block: int, name: str) -> Tensor:
        with safe_open(self._tensors_file(block), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def drop_blocks(self) -> None:
        """The model's files are there: only the fingerprint stays, by which a repeated command is known."""
        for file in self.folder.iterdir():
            if file.name != "fingerprint.json":
                file.unlink()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensors_file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _hidden_file(self, block: int) -> Path:
        return self.folder / f"hidden-{block:05d}.f32"

    def _map(self, path: Path) -> Tensor:
        flat = torch.from_file(str(path), shared=True, size=prod(self._shape), dtype=torch.float32)
        return flat.view(self._shape)


def refuse_difference(work_dir: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raises ConfigError where ``work_dir`` holds a run whose fingerprint has other values for these keys."""
    written = work_dir / FOLDER / "fingerprint.json"
    if not written.exists():
        return
    old, new = read_json(written), json.loads(json.dumps(fingerprint))
    differing = [key for key in new if old.get(key) != new[key]]
    if differing:
        shown = ", ".join(f"{key} ({old.get(key)} then, {new.get(key)} now)" for key in differing[:3])
        raise ConfigError(
            f"{work_dir} holds a run with other options: {shown}",
            "give --fresh to start over, the same options to go on, or another --work-dir",
        )
