"""`lmtool bench online URL`: what a server does with a workload, ours or any other that speaks OpenAI's API."""

from importlib.util import find_spec
from typing import Annotated

import typer

from lmtool.commands.bench_options import JsonFile, Png, Seed
from lmtool.errors import ConfigError, InputError

Url = Annotated[str, typer.Argument(metavar="URL", help="Of the server, as in http://localhost:8000.")]
Model = Annotated[str | None, typer.Option(help="As the server calls it (default: the first that it names).")]
Mix = Annotated[str, typer.Option(help="static, or chat1000, sharegpt100, uniform, shared-prefix, long-context.")]
NumPrompts = Annotated[int | None, typer.Option(help="Requests (default: 100, or the mix's own number).")]
InputLen = Annotated[int, typer.Option(help="Of static: tokens of a prompt; of words it is their number.")]
OutputLen = Annotated[int, typer.Option(help="Of static: tokens of an answer.")]
RequestRate = Annotated[str, typer.Option(metavar="N|inf", help="Requests a second, Poisson; inf: all at once.")]
MaxConcurrency = Annotated[int | None, typer.Option(help="At most so many requests at a time; others wait.")]
Endpoint = Annotated[str, typer.Option(help="completions, or chat: /v1/chat/completions.")]
TokenIds = Annotated[
    int | None, typer.Option(metavar="N", help="Prompts of random token ids below N, of exact length, not of words.")
]
IgnoreEos = Annotated[bool, typer.Option(help="Ask for answers of full length.")]
Timeout = Annotated[float, typer.Option(help="Seconds for a whole answer.")]
Clients = Annotated[int, typer.Option(help="Processes that send and read; one reads some 10,000 tokens a second.")]
ApiKey = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")]


def online(
    url: Url,
    *,
    model: Model = None,
    mix: Mix = "static",
    num_prompts: NumPrompts = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    request_rate: RequestRate = "inf",
    max_concurrency: MaxConcurrency = None,
    endpoint: Endpoint = "completions",
    token_ids: TokenIds = None,
    ignore_eos: IgnoreEos = True,
    timeout: Timeout = 600.0,
    clients: Clients = 1,
    api_key: ApiKey = None,
    seed: Seed = 0,
    json: JsonFile = None,
    png: Png = None,
) -> None:
    """A server's throughput and latencies, streamed over HTTP from a process of its own."""
    if find_spec("httpx") is None:
        raise InputError("bench online needs httpx, which is not installed", "pip install 'lmtool[bench]'")
    from lmtool.bench.online import OnlinePlan, run_online

    plan = OnlinePlan(
        url=url,
        model=model,
        mix=mix,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        request_rate=_rate(request_rate),
        max_concurrency=max_concurrency,
        endpoint=endpoint,
        token_ids=token_ids,
        ignore_eos=ignore_eos,
        timeout_s=timeout,
        seed=seed,
        num_clients=clients,
    )
    run_online(plan, api_key=api_key, json_file=json, png=png)


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--request-rate is {text!r}", "give requests per second, or inf") from None
