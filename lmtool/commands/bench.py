"""`lmtool bench`: what this machine allows, what the engine does with it, and reports side by side."""

from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands import options
from lmtool.commands.bench_kernels import kernels
from lmtool.commands.bench_kv import kv
from lmtool.commands.bench_online import online
from lmtool.commands.bench_options import JsonFile, Png, Seed, numbers
from lmtool.commands.bench_plan import curve, plan
from lmtool.errors import ConfigError, InputError

app = typer.Typer(help="Measure the engine, beside what this machine allows.", no_args_is_help=True)
app.command()(kernels)
app.command()(online)
app.command()(curve)
app.command()(plan)
app.command()(kv)

Model = Annotated[
    str | None,
    typer.Option(help=f"A folder, a .gguf file, a hub id or a short name (default: {options.DEFAULT_MODEL})."),
]
Shape = Annotated[str | None, typer.Option(help="Random weights in this shape instead: llama3-8b, internlm2-1_8b, …")]
GroupSize = Annotated[
    int | None, typer.Option("--w-group-size", help="Of --shape: 4-bit weights (W4A16) in groups of 32, 64 or 128.")
]
Against = Annotated[str | None, typer.Option(help="Measure in turn with 'transformers': same process, same weights.")]
Mixes = Annotated[
    str,
    typer.Option("--mix", help="static, or chat1000, sharegpt100, uniform, shared-prefix, long-context; by commas."),
]
Batches = Annotated[str, typer.Option(help="Of static: numbers of requests at once, by commas.")]
InputLen = Annotated[int, typer.Option(help="Of static: prompt tokens.")]
OutputLen = Annotated[int | None, typer.Option(help="Of static: tokens out (default: 256, or 32 with --against).")]
PrefillLen = Annotated[int, typer.Option(help="Tokens of the prompt whose first token is timed; 0: leave it out.")]
Repeats = Annotated[int, typer.Option(help="Timed runs of each workload; the median is told.")]
WarmUp = Annotated[int, typer.Option(help="Runs of each workload that are not timed.")]
Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="What --json wrote; or a peer's, in that form.")]
Metric = Annotated[str, typer.Option(help="Which figure to set side by side, as the JSON names it.")]


@app.command()
def offline(
    *,
    model: Model = None,
    shape: Shape = None,
    w_group_size: GroupSize = None,
    against: Against = None,
    mix: Mixes = "static",
    batches: Batches = "1,8",
    input_len: InputLen = 128,
    output_len: OutputLen = None,
    prefill_len: PrefillLen = 512,
    repeats: Repeats = 3,
    warm_up: WarmUp = 1,
    seed: Seed = 0,
    device: options.Device = options.ENGINE_DEFAULTS.device,
    dtype: options.Dtype = options.ENGINE_DEFAULTS.dtype,
    tp: options.Tp = None,
    rank_hosts: options.RankHosts = None,
    max_batch_size: options.MaxBatchSize = None,
    quant_policy: options.QuantPolicy = None,
    kv_dtype: options.KvDtype = None,
    cache_gb: options.CacheGb = None,
    cache_host_gb: options.CacheHostGb = None,
    cache_max_entry_count: options.CacheMaxEntryCount = None,
    json: JsonFile = None,
    png: Png = None,
) -> None:
    """Workloads on the engine itself: token ids in and out, greedy, no text and no HTTP inside."""
    from lmtool.bench import session

    if model is not None and shape is not None:
        raise ConfigError("--model and --shape were both given", "give one of them")
    plan = session.Plan(
        model=None if shape else model or options.DEFAULT_MODEL,
        shape=shape,
        group_size=w_group_size,
        against=against,
        mixes=tuple(mix.split(",")),
        batches=numbers("--batches", batches),
        input_len=input_len,
        output_len=output_len if output_len is not None else 32 if against else 256,
        prefill_len=prefill_len,
        repeats=repeats,
        warm_up=warm_up,
        seed=seed,
    )
    engine = options.engine_config(
        device=device,
        dtype=dtype,
        tp=tp,
        rank_hosts=options.separate(rank_hosts),
        max_batch_size=max_batch_size,
        quant_policy=quant_policy,
        kv_dtype=kv_dtype,
        cache_gb=cache_gb,
        cache_host_gb=cache_host_gb,
        cache_max_entry_count=cache_max_entry_count,
    )
    session.run_offline(plan, engine, json_file=json, png=png)


@app.command()
def limits(
    device: options.Device = options.ENGINE_DEFAULTS.device,
    json: JsonFile = None,
) -> None:
    """What this machine does at best: read, copy, multiply, start a kernel."""
    from lmtool.bench import session

    session.run_limits(device, json_file=json)


@app.command()
def report(files: Files, metric: Metric = "output_tokens_per_s", png: Png = None) -> None:
    """Show saved reports: one in full, several side by side."""
    from lmtool.bench import session

    if png is not None and len(files) > 1:
        raise InputError("--png draws one report", "give one file with it")
    session.show_reports(files, metric, png=png)
