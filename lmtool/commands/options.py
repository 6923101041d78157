"""Options that several commands share, each described once, and what they become.

A flag that was not given is None, so that a checkpoint's own defaults can fill it. Ranges are not repeated here:
`EngineConfig` and `GenerationConfig` validate and name the flag. Knows neither torch nor any model.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtool.config import DTYPES, KV_DTYPES, EngineConfig, GenerationConfig
from lmtool.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"

_SAMPLING = "Sampling (not given: the checkpoint's own defaults)"
_ENGINE = "Engine"
_SOURCE = "Model"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a .gguf file, a hub id, or a short name (`lmtool list` shows them)."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=_SOURCE)]
DownloadDir = Annotated[
    Path | None,
    typer.Option(help="Where hub models are kept (default: HF_HOME).", rich_help_panel=_SOURCE),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        "--model-name",
        metavar="NAME|FILE",
        help="A chat template by name or as a Jinja file, for a checkpoint that brings none.",
        rich_help_panel=_SOURCE,
    ),
]
ServedChatTemplate = Annotated[  # --model-name is what a server calls its model
    str | None,
    typer.Option(
        "--chat-template",
        metavar="NAME|FILE",
        help="A chat template by name or as a Jinja file, for a checkpoint that brings none.",
        rich_help_panel=_SOURCE,
    ),
]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_ENGINE)]
Dtype = Annotated[str, typer.Option(help=", ".join(DTYPES), rich_help_panel=_ENGINE)]
ModelFormat = Annotated[
    str | None,
    typer.Option(help="Insist on hf, awq, gptq, gguf or lmtool; left out, it is detected.", rich_help_panel=_ENGINE),
]
SessionLen = Annotated[
    int | None,
    typer.Option(help="Longest conversation in tokens (default: the model's own).", rich_help_panel=_ENGINE),
]
MaxBatchSize = Annotated[
    int | None, typer.Option(help="Most requests computed in one step (default: 256).", rich_help_panel=_ENGINE)
]
CacheMaxEntryCount = Annotated[
    float | None,
    typer.Option(help="Share of the free GPU memory for the KV cache (default: 0.8).", rich_help_panel=_ENGINE),
]
QuantPolicy = Annotated[
    int | None,
    typer.Option(help="The K/V cache: 0 as numbers, 8 int8, 4 int4 (default: 0).", rich_help_panel=_ENGINE),
]
KvDtype = Annotated[
    str | None,
    typer.Option(help="The same by name: " + ", ".join(KV_DTYPES) + ".", rich_help_panel=_ENGINE),
]
CacheGb = Annotated[
    float | None,
    typer.Option(help="Size of the KV cache in GiB; on a CPU this bounds it.", rich_help_panel=_ENGINE),
]
CacheHostGb = Annotated[
    float | None,
    typer.Option(
        help="Host memory in GiB for what the KV cache has no room for (default: 0); it is copied back when needed.",
        rich_help_panel=_ENGINE,
    ),
]
Tp = Annotated[
    int | None,
    typer.Option(
        help="GPUs that share the model, from --device on (default: 1). What they hold of it, and its K/V cache, is "
        "divided by them.",
        rich_help_panel=_ENGINE,
    ),
]
RankHosts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Machines that take an equal part of the --tp ranks each, where `lmtool serve ranks` runs; several times, "
        "or with commas.",
        rich_help_panel=_ENGINE,
    ),
]
Backend = Annotated[str | None, typer.Option(hidden=True)]  # LMDeploy has two engines
_ENGINE_NAMES = ("turbomind", "pytorch")

Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; higher is more varied.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int | None, typer.Option(help="Choose among the K likeliest tokens; 0: off.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Choose among the likeliest tokens of this total; 1: off.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the likeliest; 0: off.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 discourages repeating; 1: off.", rich_help_panel=_SAMPLING)
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="-2 to 2, for tokens the answer has; 0: off.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(help="-2 to 2, for each time the answer has a token; 0: off.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.", rich_help_panel=_SAMPLING)]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Longest answer in tokens (default: up to the context).", rich_help_panel=_SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="A text that ends the answer; may be given several times.", rich_help_panel=_SAMPLING
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(help="With --json: alternatives to report for each token.", rich_help_panel=_SAMPLING),
]

ENGINE_DEFAULTS = EngineConfig()


def say_one_engine(name: str) -> None:
    """`--backend` is understood. Raises ConfigError for one that nobody has."""
    if name not in _ENGINE_NAMES:
        raise ConfigError(f"--backend is {name!r}", "leave it out: lmtool has one engine")
    print(f"lmtool: {name} is taken as lmtool's own engine; there is one", file=sys.stderr)


def given(**flags: Any) -> dict[str, Any]:
    """Only the flags that were given."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def separate(values: list[str] | None) -> tuple[str, ...] | None:
    """Of a flag that is given several times, or with commas."""
    return tuple(one for value in values for one in value.split(",")) if values else None


def engine_config(**flags: Any) -> EngineConfig:
    """An `EngineConfig` of the flags that were given. Raises ConfigError, which names the flag."""
    return EngineConfig(**given(**flags))


def generation_config(flags: Mapping[str, Any], checkpoint: Mapping[str, Any] | None = None) -> GenerationConfig:
    """Sampling: what was given, else the checkpoint's own defaults, else lmtool's.

    Raises RequestError, which names the flag.
    """
    return GenerationConfig(**{**(checkpoint or {}), **flags})
