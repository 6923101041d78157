"""`lmtool lite kv_qparams`: the parameters of a static int8 K/V cache, from what `lite calibrate` saw."""

from pathlib import Path
from typing import Annotated

import typer

WorkDir = Annotated[Path, typer.Option(metavar="FOLDER", help="Where `lite calibrate` wrote what it saw.")]
TurbomindDir = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="The workspace they are for (also as WORKSPACE/triton_models/weights/)."),
]
KvSym = Annotated[bool, typer.Option("--kv-sym", help="Zero points of 0, scales from the largest absolute value.")]
Granularity = Annotated[
    str,
    typer.Option(help="What shares a scale: tensor (a layer's K or V), head, or channel (for the calibrated length)."),
]
NumTp = Annotated[int, typer.Option(help="Ranks that the model will run on.")]


def kv_qparams(
    work_dir: WorkDir = Path("./work_dir"),
    turbomind_dir: TurbomindDir = Path("./workspace"),
    kv_sym: KvSym = False,
    granularity: Granularity = "tensor",
    num_tp: NumTp = 1,
) -> None:
    """Write a static int8 K/V cache's parameters into a workspace; `quant_policy = 8` in its engine.toml uses them."""
    from lmtool.quant.kv_qparams import kv_qparams as run

    path, about = run(work_dir, turbomind_dir, symmetric=kv_sym, granularity=granularity, num_tp=num_tp)
    typer.echo(
        f"{path} holds scales and zero points of each {about.granularity}, calibrated on {about.seqlen} tokens: "
        f"use them with --quant-policy 8, or quant_policy = 8 in {path.parent / 'engine.toml'}"
    )
