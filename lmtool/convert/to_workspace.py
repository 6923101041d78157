"""A checkpoint into a workspace: one tensor at a time, into files beside the destination, then in one rename."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from lmtool import __version__
from lmtool.checkpoint.engine_file import ENGINE_FILE, engine_file_text
from lmtool.checkpoint.formats import Checkpoint, open_checkpoint
from lmtool.checkpoint.llava_tower import find_tower, missing_tower
from lmtool.checkpoint.manifest import MANIFEST, PICKLE_SUFFIXES
from lmtool.checkpoint.tensor_file import TensorFile
from lmtool.checkpoint.vision import copy_picture_files
from lmtool.checkpoint.workspace import Workspace
from lmtool.checkpoint.workspace_manifest import (
    FORMAT_VERSION,
    TEXT_VERSION,
    VISION,
    Manifest,
    SourceEntry,
    TensorEntry,
    WeightEntry,
)
from lmtool.checkpoint.writer import write_text
from lmtool.convert import compare
from lmtool.convert.job import Job, check_source, group_size_of, refuse_links_out
from lmtool.convert.place import check_destination, new_folder
from lmtool.convert.progress import Progress, silent
from lmtool.convert.stored import StoredForm, stored_form
from lmtool.convert.unpickle import as_safetensors, pickle_files
from lmtool.convert.vision import check_vision, vision_forms
from lmtool.convert.whole import check_weights
from lmtool.errors import ConfigError
from lmtool.images.form import read_image_form
from lmtool.models.config import ModelConfig
from lmtool.models.loader import read_model_config
from lmtool.models.source import Source, names_of
from lmtool.tokenizer import Tokenizer, load_tokenizer
from lmtool.tokenizer.save import save_tokenizer

SHARD_BYTES = 4 << 30
_READ_BYTES = 16 << 20
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made. exact: every number and code is the source's; difference: of the logits, None: not compared."""

    manifest: Manifest
    num_bytes: int
    exact: bool
    difference: compare.Difference | None


def convert(job: Job, progress: Progress | None = None) -> Converted:
    """Raises InputError of the kind that fits, and leaves the destination as it was."""
    progress = progress or silent
    check_destination(job.destination, overwrite=job.overwrite)
    if not job.allow_bin:
        return _convert(job, job.source, progress)
    files = pickle_files(job.source)
    if not files and job.source.suffix in PICKLE_SUFFIXES:
        raise ConfigError(f"--allow-bin: {job.name} is one file", "give the folder that holds it and config.json")
    refuse_links_out(job.source)
    with ExitStack() as opened:
        folder, tower = job.source, None
        if files:
            folder = opened.enter_context(as_safetensors(job.source, files, job.destination, progress))
        if folder.is_dir() and (name := missing_tower(folder)) is not None:
            tower = find_tower(job.source, name)
            if pickled := pickle_files(tower):
                refuse_links_out(tower)
                unpickled = as_safetensors(tower, pickled, job.destination, progress, "unpickled-tower")
                tower, files = opened.enter_context(unpickled), pickled
        if not files:
            raise ConfigError(f"--allow-bin: {job.name} has no pickle weights, or has safetensors too", "leave it out")
        return _convert(job, folder, progress, tower)


def _convert(job: Job, path: Path, progress: Progress, tower: Path | None = None) -> Converted:
    """path: of the safetensors or the GGUF file; tower: of a LLaVA's tower that is not in it and was found."""
    with closing(open_checkpoint(path, tower=tower)) as checkpoint:
        job.check_checkpoint(checkpoint)
        check_source(path, checkpoint)
        model = read_model_config(checkpoint.config)
        job.check_split(model)
        check_weights(checkpoint, model)
        source = Source(checkpoint, model, names_of(checkpoint), torch.float32, _CPU)
        tokenizer = load_tokenizer(job.tokenizer_path or path, chat_template=job.chat_template)
        pictures = None if checkpoint.vision is None else _picture_folder(job)
        with new_folder(job.destination, overwrite=job.overwrite) as folder:
            weights, exact = _write_weights(source, folder, _dtype(job), progress)
            save_tokenizer(tokenizer, job.tokenizer_path or path, folder)
            if pictures is not None:
                copy_picture_files(pictures, folder)
            write_text(folder / ENGINE_FILE, engine_file_text(model.max_positions))
            manifest = _manifest(job, source, weights, tokenizer, progress)
            write_text(folder / MANIFEST, _as_json(manifest))
            difference = _check(folder, source, exact=exact, progress=progress) if job.check else None
    num_bytes = sum(file.stat().st_size for file in job.destination.iterdir())
    return Converted(manifest, num_bytes, exact, difference)


def _picture_folder(job: Job) -> Path:
    """Where it is said how pictures are cut. Raises CheckpointError where it is not, or what cannot be done."""
    beside = job.tokenizer_path
    if beside is not None and read_image_form(beside) is not None:
        return beside
    read_image_form(job.source)
    return job.source


def _dtype(job: Job) -> torch.dtype | None:
    return None if job.dtype == "auto" else getattr(torch, job.dtype)


def _write_weights(
    source: Source, folder: Path, dtype: torch.dtype | None, progress: Progress
) -> tuple[dict[str, WeightEntry], bool]:
    wanted = source.wanted()
    if source.config.tie_word_embeddings and source.int8_head() is not None:
        wanted.append("head.weight")
    places = list(weight_places(wanted, source.config))
    forms = _forms(source, places, dtype, progress)
    num_weights = len(places)
    if (vision := source.checkpoint.vision) is not None:
        forms = chain(forms, vision_forms(vision, dtype, progress))
        num_weights += len(vision.names())
    entries: dict[str, WeightEntry] = {}
    exact, num_files = True, 0
    while len(entries) < num_weights:
        num_files += 1
        path = folder / f"weights-{num_files:05d}.safetensors"
        with TensorFile(path, most_tensors=3 * num_weights) as file:
            for ours, form in forms:
                entries[ours] = write_form(file, ours, form)
                exact = exact and form.exact
                if file.num_bytes >= SHARD_BYTES:
                    break
    return entries, exact


def weight_places(wanted: list[str], model: ModelConfig) -> Iterator[tuple[str, int]]:
    """(our name, layer) of every weight, in the order in which a model is loaded."""
    outer = [ours for ours in wanted if "{i}" not in ours]
    yield from ((ours, 0) for ours in outer)
    for i in range(model.num_layers):
        yield from ((ours, i) for ours in wanted if "{i}" in ours)


def _forms(
    source: Source, places: list[tuple[str, int]], dtype: torch.dtype | None, progress: Progress
) -> Iterator[tuple[str, StoredForm]]:
    for done, (ours, i) in enumerate(places):
        progress("converting", done, len(places))
        yield ours.format(i=i), stored_form(source, ours, i, dtype)
    progress("converting", len(places), len(places))


def write_form(file: TensorFile, ours: str, form: StoredForm) -> WeightEntry:
    parts = {}
    for part, tensor in form.parts.items():
        name = ours if part == "values" else f"{ours}.{part}"
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts[part] = TensorEntry(name, file.path.name, dtype, tuple(tensor.shape), file.add(name, tensor))
    return WeightEntry(form.kind, form.shape, parts, form.group_size, form.paired)


def _manifest(
    job: Job, source: Source, weights: dict[str, WeightEntry], tokenizer: Tokenizer, progress: Progress
) -> Manifest:
    checkpoint, vision = source.checkpoint, source.checkpoint.vision
    config = _without_quantization(checkpoint.config if vision is None else vision.written_config)
    if job.dtype != "auto":
        config |= {"dtype": job.dtype, "torch_dtype": job.dtype}
    return Manifest(
        format_version=TEXT_VERSION if vision is None else FORMAT_VERSION,
        lmtool_version=__version__,
        source=SourceEntry(job.name, checkpoint.format, dict(_file_sums(job.source, progress))),
        config=config,
        generation_config=checkpoint.generation_config,
        dtype=_numbers(weights),
        quantization=_quantization(checkpoint, weights),
        chat_template=tokenizer.chat_template,
        weights=weights,
        names={} if vision is None else dict(vision.form.beginnings),
    )


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """At either level of a LLaVA's."""
    left = {key: value for key, value in config.items() if key != "quantization_config"}
    inner = left.get("text_config")
    return left | ({"text_config": _without_quantization(inner)} if isinstance(inner, dict) else {})


def _numbers(weights: dict[str, WeightEntry]) -> str:
    """The dtype of most of the language model's tensors that hold numbers."""
    own = (weight for name, weight in weights.items() if not name.startswith(VISION))
    dtypes = [weight.parts["values"].dtype for weight in own if weight.kind == "dense"]
    return max(set(dtypes), key=dtypes.count)


def _quantization(checkpoint: Checkpoint, weights: dict[str, WeightEntry]) -> dict[str, Any] | None:
    """For people: how many weights hold codes of which kind, in groups of how many."""
    packed = [weight for weight in weights.values() if weight.kind != "dense"]
    if not packed:
        return None
    return {
        "weights": {kind: sum(weight.kind == kind for weight in packed) for kind in sorted({w.kind for w in packed})},
        "group_sizes": sorted({weight.group_size for weight in packed}),
        "source_group_size": group_size_of(checkpoint),
    }


def _file_sums(source: Path, progress: Progress) -> Iterator[tuple[str, str]]:
    """Name and XXH3 of each weight file of the source."""
    files = [source] if source.is_file() else pickle_files(source) or sorted(source.glob("*.safetensors"))
    for done, file in enumerate(files):
        progress("summing the source's files", done, len(files))
        digest = xxhash.xxh3_128()
        with file.open("rb") as stream:
            while piece := stream.read(_READ_BYTES):
                digest.update(piece)
        yield file.name, digest.hexdigest()


def _as_json(manifest: Manifest) -> str:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1).decode() + "\n"


def _check(folder: Path, source: Source, *, exact: bool, progress: Progress) -> compare.Difference:
    """Raises InputError where what was written is not what was read."""
    written = Workspace(folder)
    for done, name in enumerate(written.all_names()):
        progress("reading it again", done, len(written.all_names()))
        written.verify(name)
    check_vision(source.checkpoint, written)
    actual = Source(written, source.config, names_of(written), torch.float32, _CPU)
    return compare.check(source, actual, exact=exact, progress=progress)
