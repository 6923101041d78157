"""`lmtool bench kernels`: each op of the kernels' door, checked against the reference, then timed beside its limit."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.bench import limits, outputs, timing
from lmtool.bench.checks import TOLERANCE, relative_error
from lmtool.bench.kernel_cases import GROUPS, cases
from lmtool.bench.kernel_maker import Arguments, Case, Maker
from lmtool.bench.report import Report, make_console, make_report, show
from lmtool.bench.shapes import part_of
from lmtool.engine.device import choose_device, choose_dtype, free_bytes
from lmtool.errors import ConfigError, KernelError, MemoryShortError

_ROTATED_BYTES = 256 << 20  # of arguments in one chain of calls: several times any card's second-level cache
_MOST_SETS = {"cuda": 256, "cpu": 96}
_SHAPES = {"cuda": "llama3-8b", "cpu": "smollm2-135m"}  # where none is asked for: what such a machine serves
_NEAR_TIES = 64  # one sampled row in so many may fall on the other side of a tie between two roundings


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """What to time. shape None: by the device; tp: in the sizes of one of so many ranks.

    Raises ConfigError, which names the flag.
    """

    shape: str | None = None
    tp: int = 1
    rows: tuple[int, ...] = (1, 8, 16, 64, 256)
    only: tuple[str, ...] | None = None
    context: int = 1024
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ConfigError(f"--context is {self.context}", "give 2 or more")
        for group in self.only or ():
            if group not in GROUPS:
                raise ConfigError(f"--only {group!r} is not known", f"give some of {', '.join(GROUPS)}")


def run_kernels(plan: KernelPlan, *, json_file: str | None = None, png: Path | None = None) -> Report:
    """A table on stdout (stderr where the JSON goes to stdout).

    Raises KernelError for an op whose result is wrong: nothing is reported then.
    """
    outputs.check(json_file, png)
    device = choose_device(plan.device)
    shape = plan.shape or _SHAPES[device.type]
    model = part_of(shape, plan.tp)
    dtype = choose_dtype(plan.dtype, model, device)
    maker = Maker(model, dtype, device, plan.context)
    wanted = [case for case in cases(maker, plan.rows) if plan.only is None or case.group in plan.only]
    notices = make_console(stderr=True)
    with notices.status("measuring this machine") as status:
        measured = limits.measure(device)
        results = measure(wanted, dtype, device, measured, status.update)
    settings = {"plan": asdict(plan), "kernels": kernels.implementation("linear", device, dtype).__name__.split(".")[2]}
    report = make_report(shape, str(dtype).removeprefix("torch."), measured, settings)
    report = dataclasses.replace(report, results=results)
    outputs.write(report, json_file, png)
    console = notices if json_file == "-" else make_console()
    show(report, console)
    if settings["kernels"] == "reference":
        console.print("these are the reference ops in plain torch, timed by the host's clock", highlight=False)
    return report


def measure(
    wanted: Sequence[Case],
    dtype: torch.dtype,
    device: torch.device,
    measured: limits.Limits,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Results of a report, one for each case: ``time_s``, ``library_s``, ``error``. Raises KernelError."""
    results = []
    with torch.inference_mode():
        for i, case in enumerate(wanted):
            progress(f"{i + 1} of {len(wanted)}: {case.name}")
            results.append(_measure(case, dtype, device, measured))
    return results


def _measure(case: Case, dtype: torch.dtype, device: torch.device, measured: limits.Limits) -> dict[str, Any]:
    torch.manual_seed(case.rows)
    first = case.make()
    error = check(case, first, dtype)
    sets = [first, *(case.make() for _ in range(_num_sets(case, first, device) - 1))]
    op = getattr(kernels, case.op)
    durations_s = timing.durations_s(lambda i: op(*sets[i]), len(sets), device)
    limit_s = max(case.num_bytes / measured.read_bytes_per_s, case.flops / measured.matmul_flops_per_s)
    median_s = statistics.median(durations_s)
    metrics = {
        "time_s": {"median": median_s, "best": min(durations_s), "limit": limit_s, "ratio": limit_s / median_s},
    }
    if case.library is not None:
        library = case.library
        of_library_s = timing.durations_s(lambda i: library(*sets[i]), len(sets), device)
        metrics["library_s"] = {"median": statistics.median(of_library_s), "best": min(of_library_s)}
    return {
        "name": case.name,
        "group": case.group,
        "metrics": metrics,
        "durations_s": durations_s,
        "num_bytes": case.num_bytes,
        "flops": case.flops,
        "num_sets": len(sets),
        "error": error,
    }


def _num_sets(case: Case, arguments: Arguments, device: torch.device) -> int:
    """So many that together they pass the caches; small ones stay in them, as in a model."""
    one = sum(part.nbytes for part in _tensors(arguments))
    wanted = max(2, min(_MOST_SETS[device.type], -(-_ROTATED_BYTES // max(one, 1))))
    free = free_bytes(device)
    if 2 * one > free // 2:
        raise MemoryShortError(
            f"{case.name} needs {2 * one / 2**30:.1f} GiB to be timed, {free / 2**30:.1f} GiB are free",
            "give smaller --rows, --context or --shape",
        )
    return min(wanted, free // 2 // max(one, 1))


# ---------------------------------------------------------------------- is it right?
def check(case: Case, arguments: Arguments, dtype: torch.dtype) -> float:
    """The op on copies beside the reference in float32 on the same numbers → the largest relative error.

    Raises KernelError where that is more than a few roundings of ``dtype``.
    """
    op = getattr(kernels, case.op)
    own, wide = _copies(arguments, widen=False), _copies(arguments, widen=True)
    found = _tensors(case.compared(op(*own), own))
    with kernels.force("reference"):
        expected = _tensors(case.compared(op(*wide), wide))
    errors = [_error(one, other, case) for one, other in zip(found, expected, strict=True)]
    tolerance = TOLERANCE[dtype]
    if not all(error <= tolerance for error in errors):
        raise KernelError(
            f"{case.name} is wrong: it differs from the reference by {max(errors, key=_nan_is_largest):.2g},"
            f" {tolerance:.2g} is what {str(dtype).removeprefix('torch.')} may",
            "nothing was reported; run the tests marked gpu on this machine",
        )
    return max(errors)


def _error(found: Tensor, expected: Tensor, case: Case) -> float:
    if expected.is_floating_point():
        return relative_error(found, expected)
    different = int((found != expected).sum())
    allowed = case.rows // _NEAR_TIES if case.op == "sample" else 0
    return 0.0 if different <= allowed else different / expected.numel()


def _nan_is_largest(error: float) -> float:
    return error if error == error else float("inf")


def _copies(arguments: Arguments, *, widen: bool) -> Arguments:
    """Ops work in place: each gets its own. widen: half precision as float32, the same numbers."""

    def copy(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.float() if widen and part.dtype in (torch.float16, torch.bfloat16) else part.clone()
        if isinstance(part, kernels.QuantizedKv):  # its scales are float16 by its form
            return part._replace(**{name: getattr(part, name).clone() for name in ("k", "v", "k_meta", "v_meta")})
        if isinstance(part, kernels.BlockPieces):  # it holds addresses of its tensors
            return kernels.block_pieces([copy(one) for one in part.tensors])
        if isinstance(part, tuple):
            made = [copy(one) for one in part]
            return type(part)(*made) if hasattr(part, "_fields") else tuple(made)
        return part

    return tuple(copy(part) for part in arguments)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a result or in arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
