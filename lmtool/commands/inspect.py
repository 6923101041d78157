"""`lmtool inspect`: what a checkpoint or a workspace is, what running it takes, and whether it is whole."""

from typing import TYPE_CHECKING, Annotated

import typer

from lmtool.commands import options

if TYPE_CHECKING:
    from lmtool.convert.inspection import Inspection

Context = Annotated[int | None, typer.Option(help="Tokens of a conversation (default: the model's own context).")]
Concurrency = Annotated[int, typer.Option(help="Conversations at once.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Read every byte of a workspace and compare its checksums.")
]
Json = Annotated[bool, typer.Option("--json", help="The same as one JSON object.")]


def inspect(
    model: options.Model,
    context: Context = None,
    concurrency: Concurrency = 1,
    verify: Verify = True,
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
    json: Json = False,
) -> None:
    """What a model is, the memory that running it takes, and whether it is damaged (exit code 2 if so)."""
    from lmtool.chat.loading import loading
    from lmtool.checkpoint.hub import resolve_model
    from lmtool.convert.inspection import inspect as look

    path = resolve_model(model, revision=revision, download_dir=download_dir)
    with loading(model) as progress:
        found = look(path, context=context, concurrency=concurrency, verify=verify, progress=progress)
    if json:
        import msgspec

        print(msgspec.json.encode(found).decode())
        return
    from lmtool.chat.escape import neutralise

    for name, value in _rows(found):
        print(f"{name:<10}  {neutralise(value)}")


def _sight(found: "Inspection") -> list[tuple[str, str]]:
    """Of a model that takes pictures."""
    if (vision := found.vision) is None:
        return []
    where = f", in {vision.tower_path}" if vision.tower_path else ""
    parts = f"{vision.num_parameters / 1e9:.2f} B parameters, {vision.num_bytes / 1e9:.2f} GB"
    tiles = "1 tile" if vision.most_tiles == 1 else f"up to {vision.most_tiles} tiles"
    return [
        ("pictures", f"{vision.architecture}: {vision.tower}; with its projector {parts}{where}"),
        (
            "a picture",
            f"{tiles}, {'up to ' if vision.most_tiles > 1 else ''}{vision.most_rows:,} tokens of the context",
        ),
    ]


def _rows(found: "Inspection") -> list[tuple[str, str]]:
    model, memory = found.model, found.memory
    stored = ", ".join(f"{count} × {kind}" for kind, count in sorted(found.stored.items()))
    groups = f", groups of {', '.join(map(str, found.group_sizes))}" if found.group_sizes else ""
    made = f", made of {found.source} by lmtool {found.lmtool_version}" if found.source else ""
    template = found.no_tokenizer or found.chat_template or "none"
    heads = f"{model.num_heads} heads ({model.num_kv_heads} key/value) of {model.head_dim}"
    return [
        ("path", found.path),
        ("format", found.format + made),
        ("model", f"{model.architecture}, {found.num_parameters / 1e9:.2f} B parameters"),
        (
            "sizes",
            f"{model.num_layers} layers, hidden {model.hidden_size}, MLP {model.intermediate_size}, {heads}, "
            f"vocabulary {model.vocab_size:,}, context {model.max_positions:,}",
        ),
        *_sight(found),
        ("weights", f"{found.file_bytes / 1e9:.2f} GB: {stored}{groups}"),
        ("template", " ".join(template.split())[:200]),
        (
            "GPU memory",
            f"{(memory.weights + memory.cache) / 1e9:.2f} GB in {memory.dtype}: weights {memory.weights / 1e9:.2f}, "
            f"K/V cache {memory.cache / 1e9:.2f} for {memory.concurrency} × {memory.context:,} tokens "
            f"({memory.cache_per_token / 1024:.0f} KiB a token); a CUDA context and graphs take about 1 GB more",
        ),
        ("whole", "every byte is the one that was written" if found.verified else "names, shapes and sizes fit"),
    ]
