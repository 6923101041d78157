"""Which format a checkpoint has, and the one interface behind which formats disappear.

Knows the manifests of the formats; the bytes are read by `reader` (HF) and `gguf_checkpoint` (GGUF).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lmtool.checkpoint.manifest import MANIFEST, PICKLE_SUFFIXES, workspace_of
from lmtool.checkpoint.staging import StoredTensor
from lmtool.errors import CheckpointError

if TYPE_CHECKING:
    from lmtool.checkpoint.vision import VisionPart


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """A matrix of 4-bit codes in groups of g along K: ``w = code · scale + minimum`` or ``(code - zero) · scale``.

    codes    uint8 [N, K], values 0..15
    scale    float [N, K / g]
    minimum  float32 [N, K / g] as GGUF has it; None where there are zero points
    zero     uint8 [N, K / g], 0..15, as AWQ and GPTQ have it; None where there are minimums
    order    int64 [K]: column i of the codes multiplies in feature order[i]; None: i itself
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    zero: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def lowest(self) -> torch.Tensor:
        """What the code 0 stands for, float32 [N, K / g]; exact: a zero point times a float16 has 15 bits."""
        if self.minimum is not None:
            return self.minimum
        assert self.zero is not None
        return -self.zero.float() * self.scale.float()

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K], columns as the codes have them."""
        grouped = self.codes.view(*self.scale.shape, -1).to(torch.float32)
        return (grouped * self.scale.float()[..., None] + self.lowest[..., None]).flatten(1)


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """A matrix of 8-bit codes in groups of g along K: ``w = code · scale``.

    codes  int8 [N, K]
    scale  [N, K / g]: float16, g 32 as GGUF's Q8_0 has them; bfloat16, g = K of an output head of lmtool's own
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K], exact: a code times a float16 has 19 bits."""
        grouped = self.codes.view(*self.scale.shape, -1).to(torch.float32)
        return grouped.mul_(self.scale.float()[..., None]).flatten(1)


@dataclass(frozen=True, slots=True)
class StoredW4:
    """Where the `kernels.W4Tiles` of a matrix lie, and the order of their in features (None: as they come)."""

    tiles: StoredTensor
    num_out: int
    num_in: int
    group_size: int
    paired: bool
    order: StoredTensor | None


class Checkpoint(Protocol):
    """One stored language model; every tensor under its Hugging Face name, in a workspace under the loader's own.

    path               the folder or file
    format             'hf', 'awq', 'gptq', 'gguf' or 'lmtool' (a workspace)
    config             as in config.json; for GGUF made from its metadata; of a LLaVA the language model's part
    generation_config  as in generation_config.json, {} when there is none
    vision             of a LLaVA everything else; None: the model takes no pictures
    """

    path: Path
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    vision: "VisionPart | None"

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """As stored: 'float16', 'bfloat16', 'float32', 'q4_1', …"""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The dense tensor: HF as stored, GGUF dequantized to float32 (F16 and BF16 keep their dtype)."""
        ...

    def stored(self, name: str) -> StoredTensor | None:
        """Where what `tensor` returns lies in a file, byte for byte; None where it is made from what lies there."""
        ...

    def stored_w4(self, name: str) -> StoredW4 | None:
        """Where the kernels' own tiles lie; None where they must be made of codes."""
        ...

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        """4-bit codes as they are stored, unpacked on ``device`` (a CPU if not given); None for anything else."""
        ...

    def packed_int8(self, name: str) -> PackedInt8 | None:
        """8-bit codes as they are stored; None for anything else."""
        ...

    def close(self) -> None:
        """Let go of the files. Tensors that were handed out stay valid."""
        ...


def open_checkpoint(path: Path, *, tower: Path | None = None) -> Checkpoint:
    """Open a folder of HF files, a workspace or a ``.gguf`` file. Reads headers only.

    tower: the folder of an original LLaVA 1.5's vision tower, where it is not to be looked for.
    Raises CheckpointError for whatever is missing, half there or corrupt, naming the file.
    """
    path = workspace_of(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "give a model folder or a .gguf file")
    if (path / MANIFEST).exists():
        from lmtool.checkpoint.workspace import Workspace

        return Workspace(path)
    if path.is_dir():
        _refuse_folder_without_weights(path)
        return _open_folder(path, tower)
    if path.suffix == ".gguf":
        from lmtool.checkpoint.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    raise CheckpointError(f"{path} is neither a folder nor a .gguf file", "give the folder that holds config.json")


def _open_folder(path: Path, tower: Path | None) -> Checkpoint:
    from lmtool.checkpoint.llava_config import architecture_of, language_config
    from lmtool.checkpoint.quantized import QuantizedCheckpoint, read_scheme
    from lmtool.checkpoint.reader import HfCheckpoint

    folder = HfCheckpoint(path)
    takes_pictures = architecture_of(folder.config) is not None
    scheme = read_scheme(path, language_config(folder.config) if takes_pictures else folder.config)
    checkpoint = folder if scheme is None else QuantizedCheckpoint(folder, scheme)
    if not takes_pictures:
        return checkpoint
    from lmtool.checkpoint.vision import split

    return split(checkpoint, tower)


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle file, which runs code when it is opened",
        f"if you trust it, convert it first: lmtool convert {path.parent} --allow-bin",
    )


def _refuse_folder_without_weights(folder: Path) -> None:
    files = sorted(folder.iterdir())
    if (folder / ".state").is_dir() and not (folder / "config.json").exists():  # `quant.state` leaves it
        raise CheckpointError(
            f"{folder} holds an unfinished quantization", "run the same `lmtool lite auto_awq` again: it goes on"
        )
    if not files:
        raise CheckpointError(f"{folder} is empty", "download the model into it again")
    if any(file.name.endswith((".safetensors", ".safetensors.index.json")) for file in files):
        return
    for file in files:
        if file.suffix in PICKLE_SUFFIXES:
            raise _pickle_error(file)
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if ggufs:
        raise CheckpointError(f"{folder} holds GGUF files", f"give the file itself, as in {ggufs[0]}")
    if any(folder.rglob("*.incomplete")):
        raise CheckpointError(
            f"{folder} holds no *.safetensors, only an unfinished download", "download the model again"
        )
    raise CheckpointError(f"{folder} holds no *.safetensors", "download the model again or give another folder")
