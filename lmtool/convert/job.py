"""What a conversion was asked for, and what is refused of it before anything is read."""

from dataclasses import dataclass
from pathlib import Path

from lmtool.checkpoint.formats import Checkpoint
from lmtool.checkpoint.workspace_manifest import check_tensor_name
from lmtool.config import DTYPES, MODEL_FORMATS
from lmtool.convert.place import refuse_nesting
from lmtool.errors import CheckpointError, ConfigError
from lmtool.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Into a workspace.

    source          a folder or a .gguf file; name: what the user called it
    destination     the workspace, not there yet unless ``overwrite``
    dtype           of the numbers; 'auto': as they are stored; 4-bit codes stay codes
    tokenizer_path  where the tokenizer's files are, if not beside the weights
    chat_template   a name or a file, where the checkpoint brings none
    model_format, group_size, tp   insisted on: refused where the model is not so
    allow_bin       open pickle weights, in a process of their own
    check           read everything again, and compare the logits of a prompt with the source's
    """

    source: Path
    name: str
    destination: Path
    dtype: str = "auto"
    model_format: str | None = None
    group_size: int | None = None
    tokenizer_path: Path | None = None
    chat_template: str | None = None
    tp: int = 1
    overwrite: bool = False
    allow_bin: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.model_format not in (None, *MODEL_FORMATS):
            raise ConfigError(f"--model-format is {self.model_format!r}", "give one of " + ", ".join(MODEL_FORMATS))
        if self.tp < 1:
            raise ConfigError(f"--tp is {self.tp}", "give the number of GPUs")
        refuse_nesting(self.source, self.destination, self.name)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raises ConfigError where it is not what was insisted on."""
        if checkpoint.format == "lmtool":
            raise ConfigError(f"{self.name} is a workspace already", "`--to hf` or `--to gguf` goes back")
        if self.model_format not in (None, checkpoint.format):
            raise ConfigError(
                f"--model-format is {self.model_format!r}, {self.name} is {checkpoint.format!r}",
                "leave the flag out: the format is detected",
            )
        found = group_size_of(checkpoint)
        if self.group_size and self.group_size != found:
            has = f"has groups of {found}" if found else "has no groups"
            raise ConfigError(f"--group-size is {self.group_size}, {self.name} {has}", "leave the flag out")

    def check_split(self, model: ModelConfig) -> None:
        """Raises ConfigError for a --tp that the heads or the MLP cannot be divided by."""
        for what, size in (("attention heads", model.num_heads), ("MLP features", model.intermediate_size)):
            if size % self.tp:
                raise ConfigError(f"--tp {self.tp} does not divide the model's {size} {what}", "give a divisor")
        if model.num_kv_heads % self.tp and self.tp % model.num_kv_heads:
            raise ConfigError(f"--tp {self.tp} and {model.num_kv_heads} key/value heads", "one must divide the other")


def check_dtype(name: str) -> None:
    """Raises ConfigError for a --dtype that there is not."""
    if name not in DTYPES:
        raise ConfigError(f"--dtype is {name!r}", "give one of " + ", ".join(DTYPES))


def group_size_of(checkpoint: Checkpoint) -> int | None:
    """Of a quantized checkpoint's 4- or 8-bit weights, along the in features; None: they are numbers."""
    quantization = checkpoint.config.get("quantization_config")
    return quantization.get("group_size") if isinstance(quantization, dict) else None


def check_source(path: Path, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for names and links that lead out of the model's folder."""
    for name in checkpoint.names():
        check_tensor_name(path, name)
    if path.is_dir():
        refuse_links_out(path)


def refuse_links_out(folder: Path) -> None:
    """The hub's cache links a snapshot's files to the blobs beside it; no other link may leave the folder."""
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parents[1] / "blobs")
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in inside):
            raise CheckpointError(f"{file} is a link out of the model's folder", "copy the file into it")
