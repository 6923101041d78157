"""`lmtool lite eval`: what a model's text costs it, and what it lost beside the one it was made from."""

import json as json_format
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lmtool.commands import options
from lmtool.commands.bench_options import JsonFile
from lmtool.config import EngineConfig
from lmtool.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from lmtool.bench.evaluate import Evaluation

DEFAULT_TEXT = "pydoc_data.topics (Python's own reference)"

Against = Annotated[str | None, typer.Option(metavar="MODEL", help="The original: its loss is measured beside it.")]
Text = Annotated[
    Path | None, typer.Option(metavar="FILE|FOLDER", help=f"txt, md, jsonl or json (default: {DEFAULT_TEXT}).")
]
Windows = Annotated[int, typer.Option(help="How many stretches of the text, evenly spread.")]
WindowLen = Annotated[int, typer.Option(help="Tokens of each.")]
ChunkTokens = Annotated[
    int | None, typer.Option(help="Tokens computed in one step (default: as many as the engine's prompts).")
]


def evaluate(
    model: options.Model,
    *,
    against: Against = None,
    text: Text = None,
    windows: Windows = 16,
    window_len: WindowLen = 1024,
    chunk_tokens: ChunkTokens = None,
    device: options.Device = options.ENGINE_DEFAULTS.device,
    dtype: options.Dtype = options.ENGINE_DEFAULTS.dtype,
    quant_policy: options.QuantPolicy = None,
    kv_dtype: options.KvDtype = None,
    json: JsonFile = None,
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
) -> None:
    """Perplexity; with --against KL to the original, change of the loss and top-1 agreement, each with its error."""
    from lmtool.bench.outputs import check, put
    from lmtool.checkpoint.hub import resolve_model

    check(json, None)
    path = resolve_model(model, revision=revision, download_dir=download_dir)
    original = resolve_model(against, revision=None, download_dir=download_dir) if against is not None else None
    result, about = run(
        path,
        original,
        text,
        windows=windows,
        window_len=window_len,
        chunk_tokens=chunk_tokens,
        config=options.engine_config(device=device, dtype=dtype, quant_policy=quant_policy, kv_dtype=kv_dtype),
    )
    if json is not None:
        put(json_format.dumps({"model": model, "against": against} | about, indent=1), json)
    if json != "-":
        Console().print(table(result, f"{model}: {about['text']['name']}"))


def run(
    model: Path,
    against: Path | None,
    text: Path | None,
    *,
    windows: int,
    window_len: int,
    chunk_tokens: int | None,
    config: EngineConfig,
) -> tuple["Evaluation", dict[str, Any]]:
    """The figures, and as JSON with what the text was. Raises CheckpointError where the two tokenizers differ."""
    import hashlib
    import time

    from lmtool.bench.evaluate import evaluate as measure

    started = time.perf_counter()
    ids = evaluation_ids(model, against, text, windows, window_len)
    with _bar() as progress:
        result = measure(model, ids, config, against=against, chunk_tokens=chunk_tokens, progress=progress)
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    about = {"text": {"name": str(text or DEFAULT_TEXT), "ids": digest}}
    return result, about | result.as_json() | {"seconds": time.perf_counter() - started}


def evaluation_ids(model: Path, against: Path | None, text: Path | None, windows: int, window_len: int) -> "Tensor":
    """int64 [windows, window_len]: the text in the model's tokens, and in the original's if they are the same."""
    import torch

    from lmtool.bench.evaluate import spread
    from lmtool.checkpoint.formats import open_checkpoint
    from lmtool.quant.datasets import text_ids
    from lmtool.tokenizer import Tokenizer, load_tokenizer

    def ids_of(path: Path) -> list[int]:
        open_checkpoint(path).close()  # what is wrong with the whole is said before what is wrong with its tokenizer
        tokenizer: Tokenizer = load_tokenizer(path)
        if text is not None:
            return text_ids(text, tokenizer, "--text")
        return tokenizer.encode(_default_text(), add_special=False)

    ids = ids_of(model)
    if against is not None and ids_of(against) != ids:
        raise CheckpointError(
            f"the vocabularies differ: {model} and {against} make other tokens of the same text",
            "give the model that it was made from",
        )
    return spread(torch.tensor(ids), windows, window_len)


def _default_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def table(result: "Evaluation", title: str) -> Table:
    """What was measured, with its standard errors."""
    found = Table(title=f"{title}, {result.num_windows} windows of {result.window_len} tokens")
    found.add_column("")
    found.add_column("value", justify="right")
    found.add_column("± standard error", justify="right")
    rows = [
        (f"perplexity, {result.weights}", result.perplexity, "{:.3f}"),
        (f"perplexity, original ({result.original_weights})", result.original_perplexity, "{:.3f}"),
        ("KL to the original, nats a token", result.kl, "{:.4f}"),
        ("loss less the original's, nats a token", result.delta_nll, "{:+.4f}"),
        ("same likeliest token", result.top1_agreement, "{:.2%}"),
    ]
    for name, figure, form in rows:
        if figure is not None:
            error = form.replace("+", "").format(figure.stderr) if figure.stderr == figure.stderr else "–"
            found.add_row(name, form.format(figure.value), error)
    return found


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    bar = Progress(
        TextColumn("evaluating the {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} windows"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, count: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=count)
        bar.update(tasks[what], completed=done)

    with bar:
        yield tell
