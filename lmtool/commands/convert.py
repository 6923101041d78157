"""`lmtool convert`: any checkpoint into the engine's own format, and a workspace back into others'."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmtool.commands import options
from lmtool.errors import ConfigError

if TYPE_CHECKING:
    from lmtool.convert.to_workspace import Converted

_DEFAULT_DESTINATION = Path("workspace")
TARGETS = ("lmtool", "hf", "gguf")

First = Annotated[
    str, typer.Argument(metavar="[NAME] MODEL", help="What to convert: a folder, a .gguf file, a hub id.")
]
Second = Annotated[str | None, typer.Argument(metavar="", hidden=True)]
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the destination once the new one is complete.")]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Read it all again, and compare a prompt's logits with the source's.")
]
Json = Annotated[bool, typer.Option("--json", help="What was made as one JSON object.")]


def convert(
    first: First,
    second: Second = None,
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
    overwrite: Overwrite = False,
    check: Check = True,
    json: Json = False,
) -> None:
    """Convert a checkpoint to the engine's own format, which loads at the speed of the disk; or back.

    [NAME] MODEL: LMDeploy's first word, the name of a chat template, may come before the model.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to is {to!r}", "give " + ", ".join(TARGETS))
    name, model = (first, second) if second is not None else (None, first)
    if name is not None and chat_template is not None:
        raise ConfigError(f"{name} and --chat-template {chat_template} are one thing", "give one of them")
    from lmtool.checkpoint.hub import resolve_model
    from lmtool.convert.job import Job
    from lmtool.convert.to_workspace import convert as run

    source = quant_path or resolve_model(model, revision=revision, download_dir=download_dir)
    job = Job(
        source=source,
        name=str(quant_path or model),
        destination=dst_path or _DEFAULT_DESTINATION,
        dtype=dtype,
        model_format=model_format,
        group_size=group_size,
        tokenizer_path=tokenizer_path or (resolve_model(model) if quant_path else None),
        chat_template=chat_template or name,
        tp=tp,
        overwrite=overwrite,
        check=check,
    )
    from lmtool.chat.loading import loading

    with loading(job.name) as progress:
        made = run(job, *([progress] if progress else []))
    _say(job.destination, made, as_json=json)


def _say(destination: Path, made: "Converted", *, as_json: bool) -> None:
    import msgspec

    manifest = made.manifest
    if as_json:
        text = msgspec.json.encode(
            {
                "path": str(destination),
                "bytes": made.num_bytes,
                "weights": len(manifest.weights),
                "dtype": manifest.dtype,
                "quantization": manifest.quantization,
                "source": manifest.source,
                "exact": made.exact,
                "check": made.difference,
            }
        ).decode()
        print(text)
        return
    how = manifest.dtype
    if manifest.quantization is not None:
        how = f"4 bits in groups of {manifest.quantization['group_size']}, else {how}"
    print(f"{destination}: {len(manifest.weights)} weights, {made.num_bytes / 1e9:.2f} GB, {how}")
    if made.difference is not None:
        same = (
            "the same logits as the source's, bit by bit"
            if made.difference.equal
            else (
                f"logits within {made.difference.relative:.1e} of the source's, "
                f"{made.difference.same_top:.0%} of the likeliest tokens the same"
            )
        )
        print(f"lmtool: every tensor was read again; {same}", file=sys.stderr)
