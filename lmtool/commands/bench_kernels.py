"""`lmtool bench kernels`: every op of the kernels' door beside its limit; `--tune` makes the tuning table anew."""

from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands import options
from lmtool.commands.bench_options import JsonFile, Png, numbers
from lmtool.errors import ConfigError

Shapes = Annotated[
    str | None,
    typer.Option("--shape", help="Sizes of this model: llama3-8b, internlm2-1_8b, …; several by commas with --tune."),
]
Tp = Annotated[int, typer.Option(min=1, help="In the sizes of one of so many ranks' part.")]
Rows = Annotated[str | None, typer.Option(help="Rows (tokens, sequences) of each op, by commas.")]
Only = Annotated[str | None, typer.Option(help="Only linear, w4, norm, rope, attention, sample or step; by commas.")]
Context = Annotated[int, typer.Option(help="Of attention: tokens behind each row, and of the prompt.")]
Tune = Annotated[bool, typer.Option("--tune", help="Search the best launch configurations and write them as a table.")]
TuneFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where --tune writes (default: in XDG_CACHE_HOME, for lmtool).")
]
Dtype = Annotated[str, typer.Option(help="auto (the shape's own; float32 on a CPU), float16, bfloat16, float32")]


def kernels(
    *,
    shape: Shapes = None,
    tp: Tp = 1,
    rows: Rows = None,
    only: Only = None,
    context: Context = 1024,
    device: options.Device = options.ENGINE_DEFAULTS.device,
    dtype: Dtype = options.ENGINE_DEFAULTS.dtype,
    tune: Tune = False,
    tune_file: TuneFile = None,
    json: JsonFile = None,
    png: Png = None,
) -> None:
    """Every op behind the kernels' door in a model's sizes, checked against the reference, beside its limit."""
    given = None if rows is None else numbers("--rows", rows)
    if given is not None and min(given) < 1:
        raise ConfigError(f"--rows has {min(given)}", "give 1 or more")
    options.engine_config(device=device, dtype=dtype)  # refuses what they cannot be
    if tune:
        if only is not None or png is not None:
            raise ConfigError("--tune measures the matrix products and draws nothing", "leave --only and --png out")
        from lmtool.bench.tune_session import run_tune

        names = (shape or "llama3-8b").split(",")
        run_tune(names, given or (1, 16, 32, 64), tp=tp, dtype=dtype, device=device, file=tune_file, json_file=json)
        return
    if tune_file is not None:
        raise ConfigError("--tune-file was given without --tune", "add --tune")
    from lmtool.bench.kernel_session import KernelPlan, run_kernels

    plan = KernelPlan(
        shape=shape,
        tp=tp,
        rows=given or (1, 8, 16, 64, 256),
        only=None if only is None else tuple(only.split(",")),
        context=context,
        device=device,
        dtype=dtype,
    )
    run_kernels(plan, json_file=json, png=png)
