"""`lmtool lite`: make a model smaller. Flags of both generations of LMDeploy, each described once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lmtool.commands import options
from lmtool.commands.lite_eval import evaluate
from lmtool.commands.lite_kv_qparams import kv_qparams
from lmtool.errors import ConfigError

app = typer.Typer(help="Make a model smaller, and measure what it cost.", no_args_is_help=True)
app.command("eval")(evaluate)
app.command("kv-qparams")(kv_qparams)

_CALIBRATION = "Calibration text"
_FORMAT = "Format"
_RUN = "Run"

WorkDir = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the result goes.", rich_help_panel=_RUN)]
CalibDataset = Annotated[
    str | None,
    typer.Option(
        metavar="self|FILE|FOLDER|NAME",
        help="self (default): what the model writes itself; txt, md, jsonl or json; or c4, ptb, wikitext2, pileval "
        "from the hub.",
        rich_help_panel=_CALIBRATION,
    ),
]
CalibSamples = Annotated[
    int | None, typer.Option(help="Sequences (default 64); 0: plain rounding.", rich_help_panel=_CALIBRATION)
]
CalibSeqlen = Annotated[
    int | None, typer.Option(help="Tokens of each sequence (default 512).", rich_help_panel=_CALIBRATION)
]
BatchSize = Annotated[
    int | None, typer.Option(help="Sequences computed at once (default 4).", rich_help_panel=_CALIBRATION)
]
Seed = Annotated[
    int | None,
    typer.Option(help="Which stretches of the text are taken (default 0).", rich_help_panel=_CALIBRATION),
]
SearchScale = Annotated[
    bool,
    typer.Option("--search-scale", help="Accepted: the search is on anyway.", rich_help_panel=_FORMAT),
]
WBits = Annotated[int, typer.Option(help="Bits of a weight: 4, or 8 (in GPTQ's format).", rich_help_panel=_FORMAT)]
WSym = Annotated[
    bool, typer.Option("--w-sym", help="One fixed zero point (in GPTQ's format).", rich_help_panel=_FORMAT)
]
HeadBits = Annotated[
    int,
    typer.Option(help="Bits of the output head: 16 as it is; 8, which only lmtool reads.", rich_help_panel=_FORMAT),
]
WGroupSize = Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.", rich_help_panel=_FORMAT)]
Method = Annotated[
    str,
    typer.Option(
        help="rtn: plain rounding; smooth: fixed scales; awq: searched scales and clipping; gptq: error feedback; "
        "best: awq, then gptq.",
        rich_help_panel=_FORMAT,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave linears whose name this regular expression finds; may be given several times.",
        rich_help_panel=_FORMAT,
    ),
]
Dtype = Annotated[str, typer.Option(help="Of what is not quantized: auto, float16, bfloat16.", rich_help_panel=_FORMAT)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_RUN)]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over instead of going on where a run stopped.", rich_help_panel=_RUN)
]
EvalWindows = Annotated[
    int,
    typer.Option(help="Stretches of text on which it is compared to the original; 0: none.", rich_help_panel=_RUN),
]


@app.command("auto-awq")
def auto_awq(
    model: options.Model,
    *,
    work_dir: WorkDir = Path("./work_dir"),
    calib_dataset: CalibDataset = None,
    calib_samples: CalibSamples = None,
    calib_seqlen: CalibSeqlen = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    method: Method = "best",
    w_bits: WBits = 4,
    w_sym: WSym = False,
    w_group_size: WGroupSize = 128,
    head_bits: HeadBits = 16,
    skip: Skip = None,
    search_scale: SearchScale = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
    fresh: Fresh = False,
    eval_windows: EvalWindows = 8,
) -> None:
    """Quantize a model's weights to 4 bits (8 if asked); the same command again goes on where it was stopped."""
    from lmtool.quant.options import CalibrationOptions, QuantOptions

    if eval_windows < 0:
        raise ConfigError(f"--eval-windows is {eval_windows}", "give 0 (no evaluation) or more")
    typed = _typed(calib_dataset, calib_samples, calib_seqlen, batch_size, seed)
    CalibrationOptions(**typed)  # what is wrong with it is said before a model is looked for
    quant = QuantOptions(
        method=method,
        bits=w_bits,
        symmetric=w_sym,
        group_size=w_group_size,
        head_bits=head_bits,
        skip=tuple(skip or ()),
        dtype=dtype,
    )

    from lmtool.checkpoint.hub import resolve_model
    from lmtool.commands.lite_calibration import with_earlier
    from lmtool.commands.lite_progress import QuantProgress
    from lmtool.commands.lite_report import Meter, finish
    from lmtool.commands.lite_self import sampler
    from lmtool.engine.device import choose_device
    from lmtool.quant.job import Job
    from lmtool.quant.pipeline import quantize

    source = resolve_model(model, revision=revision, download_dir=download_dir)
    calibration = with_earlier(work_dir, source, typed) if quant.searches else CalibrationOptions(**typed)
    job = Job(source, work_dir, quant, calibration, choose_device(device), fresh, sampler(source, device))
    meter = Meter()
    with QuantProgress(work_dir) as progress:
        quality = quantize(job, progress)
    if progress.num_blocks_run:
        quality["run"] = meter.read(progress.num_blocks_run)
    progress.show(finish(job, quality, eval_windows, device))


@app.command()
def calibrate(
    model: options.Model,
    *,
    work_dir: WorkDir = Path("./work_dir"),
    calib_dataset: CalibDataset = None,
    calib_samples: CalibSamples = None,
    calib_seqlen: CalibSeqlen = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = "auto",
    revision: options.Revision = None,
    download_dir: options.DownloadDir = None,
) -> None:
    """Save minimum, maximum and absmax of K, V and each linear's input, per layer, on calibration text."""
    from lmtool.quant.options import CalibrationOptions

    calibration = CalibrationOptions(**_typed(calib_dataset, calib_samples, calib_seqlen, batch_size, seed))
    if calibration.samples == 0:
        raise ConfigError("--calib-samples is 0", "give 1 or more: there is nothing to see without text")

    from lmtool.checkpoint.hub import resolve_model
    from lmtool.commands.lite_progress import block_bar
    from lmtool.commands.lite_self import sampler
    from lmtool.engine.device import choose_device
    from lmtool.quant.calibrate import FOLDER
    from lmtool.quant.calibrate import calibrate as run
    from lmtool.quant.kept_text import calibration_text
    from lmtool.tokenizer import load_tokenizer

    source, on_device = resolve_model(model, revision=revision, download_dir=download_dir), choose_device(device)
    ids = calibration_text(work_dir, source, calibration, load_tokenizer(source), sampler(source, device))
    with block_bar("calibrating") as progress:
        run(source, work_dir, ids, calibration, device=on_device, progress=progress)
    typer.echo(f"{work_dir / FOLDER} holds key_value.safetensors and inputs.safetensors")


def _typed(
    dataset: str | None, samples: int | None, seqlen: int | None, batch_size: int | None, seed: int | None
) -> dict[str, Any]:
    """What was typed of `CalibrationOptions`."""
    values = {"dataset": dataset, "samples": samples, "seqlen": seqlen, "batch_size": batch_size, "seed": seed}
    return {name: value for name, value in values.items() if value is not None}
