"""`lmtool convert`: any checkpoint into the engine's own format, and a workspace back into others'."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtool.commands import options
from lmtool.errors import ConfigError

if TYPE_CHECKING:
    from lmtool.convert.compare import Difference
    from lmtool.convert.job import Job

_DEFAULT_DESTINATION = Path("workspace")
TARGETS = ("lmtool", "hf", "gguf")

NameAndModel = Annotated[
    list[str], typer.Argument(metavar="[NAME] MODEL", help="What to convert: a folder, a .gguf file, a hub id.")
]
DstPath = Annotated[
    Path | None,
    typer.Option(
        "--dst-path", "-o", help="Where to put it (default for a workspace: ./workspace).", show_default=False
    ),
]
To = Annotated[str, typer.Option(help="lmtool: the engine's own format. hf, gguf: a workspace back.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the numbers (4-bit codes stay codes); auto: as they are stored, float16 for what GGUF packs."
    ),
]
ModelFormat = Annotated[str | None, typer.Option(help="Insist on hf, awq, gptq or gguf; left out, it is detected.")]
GroupSize = Annotated[int | None, typer.Option(help="Insist on the group size of 4-bit weights; 0: any.")]
Tp = Annotated[int, typer.Option(help="Check that so many GPUs can share it. Nothing is split: each reads its part.")]
TokenizerPath = Annotated[Path | None, typer.Option(help="A folder with the tokenizer, if it is not with the weights.")]
QuantPath = Annotated[Path | None, typer.Option(help="A folder with the quantized weights, if MODEL is not it.")]
Dense = Annotated[bool, typer.Option("--dense", help="With --to hf: 4-bit codes become numbers.")]
GgufType = Annotated[
    str | None, typer.Option(help="With --to gguf: F16, Q8_0, Q4_0 or Q4_1 (default: Q4_1 for 4-bit codes, else F16).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the destination once the new one is complete.")]
AllowBin = Annotated[
    bool, typer.Option("--allow-bin", help="Open pickle weights (*.bin), in a process that can reach nothing else.")
]
Warm = Annotated[
    bool,
    typer.Option(
        "--warm", help="Also compile the kernels for the GPU at hand, into your cache: starts need no compiler."
    ),
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Read it all again, and compare a prompt's logits with the source's.")
]
Json = Annotated[bool, typer.Option("--json", help="What was made as one JSON object.")]


def convert(
    name_and_model: NameAndModel,
    dst_path: DstPath = None,
    to: To = "lmtool",
    dtype: Dtype = "auto",
    model_format: ModelFormat = None,
    group_size: GroupSize = None,
    tp: Tp = 1,
    tokenizer_path: TokenizerPath = None,
    quant_path: QuantPath = None,
    chat_template: options.ChatTemplate = None,
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
    dense: Dense = False,
    gguf_type: GgufType = None,
    overwrite: Overwrite = False,
    allow_bin: AllowBin = False,
    warm: Warm = False,
    check: Check = True,
    json: Json = False,
) -> None:
    """Convert a checkpoint to the engine's own format, which loads at the speed of the disk; or back.

    [NAME] MODEL: LMDeploy's first word, the name of a chat template, may come before the model.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to is {to!r}", "give " + ", ".join(TARGETS))
    if len(name_and_model) > 2:
        raise ConfigError(f"{' '.join(name_and_model[2:])} is too much", "give MODEL, or NAME and MODEL")
    name, model = name_and_model[0] if len(name_and_model) == 2 else None, name_and_model[-1]
    if name is not None and chat_template is not None:
        raise ConfigError(f"{name} and --chat-template {chat_template} are one thing", "give one of them")
    if to == "lmtool":
        _refuse(("--dense", dense), ("--gguf-type", gguf_type), why="4-bit codes stay codes in a workspace")
        from lmtool.checkpoint.hub import resolve_model
        from lmtool.convert.job import Job

        find = partial(resolve_model, model, revision=revision, download_dir=download_dir)
        job = Job(
            source=quant_path or find(allow_bin=allow_bin),
            name=str(quant_path or model),
            destination=dst_path or _DEFAULT_DESTINATION,
            dtype=dtype,
            model_format=model_format,
            group_size=group_size,
            tokenizer_path=tokenizer_path or (find() if quant_path else None),
            chat_template=chat_template or name,
            tp=tp,
            overwrite=overwrite,
            allow_bin=allow_bin,
            check=check,
        )
        _to_workspace(job, warm=warm, as_json=json)
        return
    of_checkpoints = {
        "NAME or --chat-template": chat_template or name,
        "--model-format": model_format,
        "--group-size": group_size,
        "--tp": tp if tp != 1 else None,
        "--tokenizer-path": tokenizer_path,
        "--quant-path": quant_path,
        "--revision": revision,
        "--download-dir": download_dir,
        "--allow-bin": allow_bin,
        "--warm": warm,
    }
    _refuse(*of_checkpoints.items(), why=f"with --to {to} a workspace is read")
    if dst_path is None:
        raise ConfigError(f"--to {to} has no destination", "give --dst-path")
    if to == "gguf":
        _refuse(("--dense", dense), ("--dtype", dtype != "auto"), why="--gguf-type says how numbers are stored")
        _to_gguf(Path(model), dst_path, kind=gguf_type, overwrite=overwrite, check=check, as_json=json)
        return
    _refuse(("--gguf-type", gguf_type), why="it is of --to gguf")
    _to_hf(Path(model), dst_path, dtype=dtype, dense=dense, overwrite=overwrite, check=check, as_json=json)


def _refuse(*flags: tuple[str, object], why: str) -> None:
    for flag, value in flags:
        if value:
            raise ConfigError(f"{flag} means nothing here: {why}", "leave it out")


def _to_workspace(job: "Job", *, warm: bool, as_json: bool) -> None:
    from lmtool.chat.loading import loading
    from lmtool.convert.to_workspace import convert as run

    if warm:
        from lmtool.engine.device import choose_device

        choose_device("cuda")  # a card that is not there is missed before minutes of work
    with loading(job.name) as progress:
        made = run(job, progress)
        if warm:
            from lmtool.config import EngineConfig
            from lmtool.engine.parts import compile_model

            compile_model(job.destination, EngineConfig(device="cuda"), progress)
    manifest = made.manifest
    if as_json:
        _print_json(
            path=str(job.destination),
            bytes=made.num_bytes,
            weights=len(manifest.weights),
            dtype=manifest.dtype,
            quantization=manifest.quantization,
            source=manifest.source,
            exact=made.exact,
            check=made.difference,
        )
        return
    how = manifest.dtype
    if manifest.quantization is not None:
        counted = (f"{count} of kind {kind}" for kind, count in manifest.quantization["weights"].items())
        how = f"{', '.join(counted)}, else {how}"
    print(f"{job.destination}: {len(manifest.weights)} weights, {made.num_bytes / 1e9:.2f} GB, {how}")
    _say_difference(made.difference)


def _to_hf(path: Path, destination: Path, *, as_json: bool, **settings: Any) -> None:
    from lmtool.chat.loading import loading
    from lmtool.convert.to_hf import export

    with loading(str(path)) as progress:
        made = export(path, destination, progress=progress, **settings)
    if as_json:
        _print_json(
            path=str(destination),
            bytes=made.num_bytes,
            tensors=made.num_tensors,
            format="awq" if made.quantized else "hf",
            check=made.difference,
        )
        return
    how = "AWQ" if made.quantized else "numbers"
    print(f"{destination}: {made.num_tensors} tensors, {made.num_bytes / 1e9:.2f} GB, {how}")
    if made.why_numbers is not None:
        print(f"lmtool: 4-bit codes became numbers: {made.why_numbers}", file=sys.stderr)
    _say_difference(made.difference)


def _to_gguf(path: Path, destination: Path, *, as_json: bool, **settings: Any) -> None:
    from lmtool.chat.loading import loading
    from lmtool.convert.to_gguf import export_gguf

    with loading(str(path)) as progress:
        made = export_gguf(path, destination, progress=progress, **settings)
    if as_json:
        _print_json(
            path=str(destination), bytes=made.num_bytes, tensors=made.num_tensors, type=made.type, check=made.difference
        )
        return
    print(f"{destination}: {made.num_tensors} tensors, {made.num_bytes / 1e9:.2f} GB, {made.type}")
    _say_difference(made.difference)


def _print_json(**found: Any) -> None:
    import msgspec

    print(msgspec.json.encode(found).decode())


def _say_difference(found: "Difference | None") -> None:
    if found is None:
        return
    same = "its logits are those of the source, bit by bit"
    if not found.equal:
        same = (
            f"its logits are within {found.relative:.1e} of the source's ({found.same_top:.0%} of top tokens the same)"
        )
    print(f"lmtool: read again and run against the source: {same}", file=sys.stderr)
