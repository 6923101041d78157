"""`lmtool list`: the models that have a short name, what architectures run, and what is on this machine already."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer


@dataclass(frozen=True, slots=True)
class ShortNameRow:
    """path: the installed file; None: it would be downloaded from the hub."""

    name: str
    hub_id: str
    path: str | None


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model of the hub's cache. complete: it has a config.json and safetensors."""

    hub_id: str
    path: str
    size_bytes: int
    complete: bool


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Show the short names, the supported architectures and the models in the hub's cache."""
    from lmtool.models.registry import SUPPORTED

    short_names, cached = _short_names(), _cached_models()
    if as_json:
        from json import dumps

        found = {
            "short_names": [asdict(row) for row in short_names],
            "architectures": list(SUPPORTED),
            "hub_cache": [asdict(model) for model in cached],
        }
        print(dumps(found, indent=1))
        return
    print("Short names")
    for row in short_names:
        print(f"  {row.name:<16} {row.path or 'not installed; downloaded from ' + row.hub_id}")
    print("\nArchitectures")
    for architecture in SUPPORTED:
        print(f"  {architecture}")
    print("\nModels in the hub's cache" + ("" if cached else ": none"))
    for model in cached:
        note = "" if model.complete else "  (no config.json or no safetensors: not a whole model)"
        print(f"  {model.hub_id:<48} {model.size_bytes / 1e9:6.1f} GB{note}")


def _short_names() -> list[ShortNameRow]:
    from lmtool.checkpoint.hub import SHORT_NAMES

    rows = []
    for name, model in SHORT_NAMES.items():
        path = model.installed_file()
        rows.append(ShortNameRow(name, model.hub_id, str(path) if path else None))
    return rows


def _cached_models() -> list[CachedModel]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []  # nothing was ever downloaded
    models = []
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        names = {file.file_name for revision in repo.revisions for file in revision.files}
        complete = "config.json" in names and any(name.endswith(".safetensors") for name in names)
        models.append(CachedModel(repo.repo_id, str(repo.repo_path), repo.size_on_disk, complete))
    return models
