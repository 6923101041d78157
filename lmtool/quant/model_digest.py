"""Whether a model is still the one that an earlier command saw, without reading all of it."""

import hashlib
from pathlib import Path

_SAMPLED_BYTES = 1 << 20


def model_digest(model: Path) -> str:
    """Of every file's name and size and the first and last MiB of the weights."""
    digest = hashlib.sha256()
    files = [model] if model.is_file() else sorted([*model.glob("*.safetensors"), *model.glob("*.json")])
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]
