"""``kv_cache.safetensors`` of a workspace: scale and zero point of a static int8 K/V cache, and whose they are.

Of each layer ``layers.i.k.scale``, ``.zero``, ``layers.i.v.scale``, ``.zero``, float32 [Hkv, D]: a number is
q · scale + zero, q from -128 to 127 (LMDeploy's ``kv_qparams``). ``last_norm``, the model's own, says whose they are.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmtool.checkpoint.manifest import workspace_of
from lmtool.checkpoint.writer import write_tensors
from lmtool.errors import CheckpointError

KV_FILE = "kv_cache.safetensors"
GRANULARITIES = ("tensor", "head", "channel")
LAST_NORM = "last_norm"
_ALL = slice(None)
AGAIN = "make them again with `lmtool lite kv_qparams`"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvAbout:
    """granularity: which numbers of a layer share a scale; num_tp: for how many ranks; seqlen: calibrated, tokens."""

    granularity: str
    symmetric: bool
    num_tp: int
    seqlen: int


@dataclass(frozen=True, slots=True)
class KvParameters:
    """layers: of each (k scale, k zero, v scale, v zero), float32 [Hkv, D]. last_norm [H]: whose they are."""

    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    last_norm: Tensor
    about: KvAbout

    def metas(self, heads: slice = _ALL) -> list[tuple[Tensor, Tensor]]:
        """k_meta and v_meta of each layer's 'static' cache, float16 [heads, 1, 2, D]: scale and smallest number."""
        return [
            (_meta(k_scale[heads], k_zero[heads]), _meta(v_scale[heads], v_zero[heads]))
            for k_scale, k_zero, v_scale, v_zero in self.layers
        ]


def _meta(scale: Tensor, zero: Tensor) -> Tensor:
    return torch.stack((scale, zero - 128 * scale), dim=1)[:, None].to(torch.float16)


def has_kv_parameters(model: Path) -> bool:
    return (workspace_of(model) / KV_FILE).exists()


def write_kv_parameters(workspace: Path, parameters: KvParameters) -> Path:
    """Whole or not at all. The path that was written."""
    tensors = {LAST_NORM: parameters.last_norm}
    for i, layer in enumerate(parameters.layers):
        names = (f"layers.{i}.{x}.{part}" for x in ("k", "v") for part in ("scale", "zero"))
        tensors |= dict(zip(names, layer, strict=True))
    path = workspace / KV_FILE
    write_tensors(path, tensors, {"about": json.dumps(asdict(parameters.about))})
    return path


def read_kv_parameters(model: Path, num_layers: int, num_kv_heads: int, head_dim: int) -> KvParameters:
    """Of a workspace. Raises CheckpointError for a damaged file and for parameters of a model of another shape."""
    path = workspace_of(model) / KV_FILE
    try:
        with safe_open(path, "pt") as file:
            about = KvAbout(**json.loads(file.metadata()["about"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors[LAST_NORM]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", AGAIN) from error
    found = {name: tensor for name, tensor in tensors.items() if name != LAST_NORM}
    wanted = [
        tuple(f"layers.{i}.{x}.{part}" for x in ("k", "v") for part in ("scale", "zero")) for i in range(num_layers)
    ]
    shape = (num_kv_heads, head_dim)
    names = {name for layer in wanted for name in layer}
    if set(found) != names or any(tensor.shape != shape for tensor in found.values()):
        theirs: Any = next(iter(found.values())).shape if found else ()
        raise CheckpointError(
            f"{path} holds parameters of another model: {len(found) // 4} layers of {list(theirs)}, "
            f"this one has {num_layers} of {list(shape)}",
            AGAIN,
        )
    layers = [tuple(found[name].float() for name in layer) for layer in wanted]
    if not all(bool(torch.isfinite(tensor).all()) for layer in layers for tensor in layer):
        raise CheckpointError(f"{path} holds parameters that are no numbers", AGAIN)
    return KvParameters(layers, tensors[LAST_NORM], about)


def check_last_norm(where: Path, theirs: Tensor, ours: Tensor) -> None:
    """Whether two models are one, but for how their matrices are stored. Raises CheckpointError."""
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours.float(), rtol=2e-2, atol=1e-3):
        raise CheckpointError(f"{where} holds parameters of another model: its last norm differs", AGAIN)
