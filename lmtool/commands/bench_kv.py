"""`lmtool bench kv`: what 4-bit weights and an int8 K/V cache save, on your own prompts."""

from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands import options
from lmtool.commands.bench_options import JsonFile, Png
from lmtool.errors import ConfigError, InputError

Model = Annotated[
    str | None, typer.Option(help=f"A model in numbers, or a GGUF of 4 bits (default: {options.DEFAULT_MODEL}).")
]
Quantized = Annotated[
    str | None, typer.Option(help="The same model in 4 bits (`lite auto_awq`); of a 4-bit GGUF it is the file itself.")
]
Shape = Annotated[str | None, typer.Option(help="Random weights in this shape instead, on a GPU: llama3-8b, …")]
GroupSize = Annotated[int, typer.Option("--w-group-size", help="Of --shape's 4-bit weights.")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Your prompts, one on each line (default: Python's own reference).")
]
Context = Annotated[int, typer.Option(help="Prompt and answer together, tokens.")]
OutputLen = Annotated[int, typer.Option(help="Tokens of each answer.")]


def kv(
    *,
    model: Model = None,
    quantized: Quantized = None,
    shape: Shape = None,
    w_group_size: GroupSize = 128,
    prompts: Prompts = None,
    context: Context = 512,
    output_len: OutputLen = 128,
    device: options.Device = options.ENGINE_DEFAULTS.device,
    dtype: options.Dtype = options.ENGINE_DEFAULTS.dtype,
    json: JsonFile = None,
    png: Png = None,
) -> None:
    """Memory and speed of one conversation: the engine, + W4A16, + KV int8, + both, and transformers."""
    from lmtool.bench import kv_table, outputs
    from lmtool.bench.kv_prompts import read_prompts, subject_of
    from lmtool.bench.report import make_console

    if shape is not None and (model or quantized or prompts):
        raise ConfigError("--shape has random weights and no tokenizer", "leave --model, --quantized and --prompts out")
    if prompts is not None and not prompts.is_file():
        raise InputError(f"--prompts {prompts} is no file", "give a text file with a prompt on each line")
    outputs.check(json, png)
    subject, dense_dtype = subject_of(
        model or (None if shape else options.DEFAULT_MODEL),
        quantized,
        shape,
        w_group_size,
        context,
        output_len,
        device,
        dtype,
    )
    ids = read_prompts(subject, prompts)
    notices = make_console(stderr=True)
    with notices.status("measuring") as status:
        wanted = kv_table.rows(subject, {"device": device, "dtype": dtype}, ids, dense_dtype=dense_dtype)
        seen, missing = kv_table.run(wanted, status.update)
    if not any(row.name == kv_table.W4 for row in wanted):
        missing.append("no row with 4-bit weights: give --quantized MODEL, as `lmtool lite auto_awq` makes it")
    for reason in missing:
        notices.print(reason, markup=False, highlight=False)
    name = f"{shape or model or options.DEFAULT_MODEL}, {len(ids)} prompts, context {context}"
    kv_table.show(seen, subject, {"model": name}, json, png)
