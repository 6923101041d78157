"""What a folder or file is, by its name alone. Imports no torch: a server's HTTP process reads tokenizers, too."""

from pathlib import Path

MANIFEST = "lmtool.json"  # what makes a folder a workspace
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def workspace_of(path: Path) -> Path:
    """The workspace that a path names: itself, or the folder around ``triton_models/weights`` (LMDeploy's layout)."""
    if path.parts[-2:] == ("triton_models", "weights") and (path.parents[1] / MANIFEST).exists():
        return path.parents[1]
    return path
