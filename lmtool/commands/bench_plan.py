"""`lmtool bench curve URL` measures a server, `lmtool bench plan` says how many such a load needs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lmtool.commands.bench_options import JsonFile, Seed, numbers
from lmtool.errors import InputError

Url = Annotated[str, typer.Argument(metavar="URL", help="Of one replica, as in http://localhost:23333.")]
Model = Annotated[str | None, typer.Option(help="As the server calls it (default: the first that it names).")]
Concurrency = Annotated[str, typer.Option(help="Numbers of requests at once, by commas; with 1.")]
InputLens = Annotated[str, typer.Option(help="Tokens of the prompts (words of about one token), by commas.")]
OutputLen = Annotated[int, typer.Option(help="Tokens of an answer, on average.")]
Rounds = Annotated[int, typer.Option(help="Requests that each client sends.")]
Card = Annotated[str | None, typer.Option(help="What the server runs on, for the file (default: what is here).")]
Timeout = Annotated[float, typer.Option(help="Seconds for a whole answer.")]
Clients = Annotated[int, typer.Option(help="Processes that send and read; one reads some 10,000 tokens a second.")]
ApiKey = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")]

Curve = Annotated[Path, typer.Option(metavar="FILE", help="What `lmtool bench curve URL --json FILE` wrote.")]
Rate = Annotated[float, typer.Option(help="Requests a second; they come as a Poisson process.")]
In = Annotated[float, typer.Option("--in", help="Tokens of a prompt, on average.")]
Out = Annotated[float, typer.Option("--out", help="Tokens of an answer, on average.")]
TargetTtft = Annotated[float | None, typer.Option(metavar="S", help="Longest time to a first token, seconds.")]
TargetItl = Annotated[float | None, typer.Option(metavar="MS", help="Longest time between tokens, milliseconds.")]
Percentile = Annotated[float, typer.Option(help="Of first tokens and gaps that keep the targets: 50, 90, 95 or 99.")]
Routing = Annotated[str, typer.Option(help="Of the front: least-queued (`serve proxy`), or random.")]
Png = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rate against the first token.")]


def curve(
    url: Url,
    *,
    model: Model = None,
    concurrency: Concurrency = "1,2,4,8,16",
    input_lens: InputLens = "128",
    output_len: OutputLen = 64,
    rounds: Rounds = 8,
    card: Card = None,
    timeout: Timeout = 600.0,
    clients: Clients = 1,
    api_key: ApiKey = None,
    seed: Seed = 0,
    json: JsonFile = None,
) -> None:
    """What one server does with 1, 2, 4, … requests at once: what `bench plan` reckons with."""
    if find_spec("httpx") is None:
        raise InputError("bench curve needs httpx, which is not installed", "pip install 'lmtool[bench]'")
    from lmtool.bench.plan_curve import CurvePlan, run_curve

    plan = CurvePlan(
        url=url,
        model=model,
        concurrency=numbers("--concurrency", concurrency),
        input_lens=numbers("--input-lens", input_lens),
        output_len=output_len,
        rounds=rounds,
        num_clients=clients,
        timeout_s=timeout,
        seed=seed,
        card=card,
    )
    run_curve(plan, api_key=api_key, json_file=json)


def plan(
    *,
    curve: Curve,
    rate: Rate,
    in_: In,
    out: Out,
    target_ttft: TargetTtft = None,
    target_itl: TargetItl = None,
    percentile: Percentile = 99.0,
    routing: Routing = "least-queued",
    json: JsonFile = None,
    png: Png = None,
) -> None:
    """How many replicas a load needs, out of the curve of one: what each is then busy with, and when one dies."""
    from lmtool.bench.plan import Load, Targets
    from lmtool.bench.plan_report import run_plan

    load = Load(rate=rate, input_len=in_, output_len=out, routing=routing)
    gap_s = target_itl / 1e3 if target_itl is not None else None
    targets = Targets(first_token_s=target_ttft, gap_s=gap_s, percentile=percentile)
    run_plan(curve, load, targets, json_file=json, png=png)
