"""`CardTrials`: product kernels with any launch configuration on a CUDA card: compiled aside, checked, timed.

Compiling is done by processes of its own, into Triton's cache, while this one times what is ready.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.bench import timing
from lmtool.bench.candidates import Card
from lmtool.bench.checks import TOLERANCE, relative_error
from lmtool.bench.decode_step import DecodeStep
from lmtool.bench.shapes import Product, products
from lmtool.bench.tune import Config, Timed, key
from lmtool.kernels.triton import tables, tuning
from lmtool.kernels.triton.launch import arch
from lmtool.models.config import ModelConfig

_EPS = 1e-5
_ROTATED_BYTES = 256 << 20  # of weights in one chain of launches: several times the second-level cache of any card
_QUICK_REPEATS, _CAREFUL_REPEATS = 3, 15
_CHECKS = 5  # of each configuration on each input: one has been seen that was wrong now and then (docs/log.md)


def card_of(device: torch.device, read_bytes_per_s: float) -> Card:
    from triton.runtime.driver import driver

    limits = driver.active.utils.get_device_properties(device.index or 0)
    return Card(limits["multiprocessor_count"], limits["max_shared_mem"], read_bytes_per_s / 1e6)


def num_workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) - 1)


class CardTrials:
    """`tune.Trials` on one card, for weights of one dtype. Close it: its processes would otherwise go on.

    models: those whose matrices are asked for; a matrix that several have is timed in the first one's step.
    """

    def __init__(self, models: Sequence[ModelConfig], dtype: torch.dtype, device: torch.device) -> None:
        self._models: dict[tuple[int, int, bool], ModelConfig] = {}
        for model in models:
            for product in products(model, dtype.itemsize):
                self._models.setdefault(_size(product), model)
        self._dtype, self._device = dtype, device
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num_workers(), context, _compile_only)
        self._case: Case | None = None
        self._steps: dict[tuple[ModelConfig, int], DecodeStep] = {}

    def close(self) -> None:
        self._case = None
        self._steps.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def current(self, product: Product, rows: int) -> Config:
        card, matrix = arch(self._device), (product.num_out, product.num_in)
        if rows == 1:
            return tuning.row_config(card, *matrix, paired=product.paired, itemsize=product.itemsize)
        return tuning.tile_config(card, rows, *matrix, paired=product.paired, itemsize=product.itemsize)

    def compile(self, product: Product, rows: int, config: Config) -> "Future[str | None]":
        return self._pool.submit(_compile, product, rows, config, self._dtype)

    def quick_us(self, product: Product, rows: int, config: Config) -> float | str:
        case = self._prepared(product, rows)
        with tuning.using(_only(product, rows, config)):
            try:
                time_us = timing.call_us(case.call, case.num_copies, _QUICK_REPEATS)
                return case.problem(_CHECKS) or time_us
            except Exception as error:
                # more shared memory or registers than was reckoned with: Triton says so when it loads a kernel
                if type(error).__name__ != "OutOfResources":
                    raise
                return str(error)

    def careful_us(self, product: Product, rows: int, configs: Sequence[Config | None]) -> list[Timed]:
        case, step = self._prepared(product, rows), self._step(product, rows)
        alone, together = [], []
        for config in configs:
            with tuning.using(_only(product, rows, config)):
                alone.append(timing.graphed(lambda: [case.call(i) for i in range(case.num_copies)]))
                together.append(step.graph())
        alone_us = [time_us / case.num_copies for time_us in timing.in_turn_us(alone, _CAREFUL_REPEATS)]
        step_us = timing.in_turn_us(together, _CAREFUL_REPEATS)
        for graph in (*alone, *together):
            graph.reset()
        return list(map(Timed, alone_us, step_us))

    def _step(self, product: Product, rows: int) -> DecodeStep:
        wanted = self._models[_size(product)], rows
        if wanted not in self._steps:
            self._steps.clear()  # its memory is for this one
            self._steps[wanted] = DecodeStep(*wanted, self._dtype, self._device)
        return self._steps[wanted]

    def _prepared(self, product: Product, rows: int) -> "Case":
        if self._case is None or (self._case.product, self._case.rows) != (product, rows):
            self._case = None  # its memory is for the next one
            self._case = Case(product, rows, self._dtype, self._device)
        return self._case


def _size(product: Product) -> tuple[int, int, bool]:
    return product.num_out, product.num_in, product.paired


def _only(product: Product, rows: int, config: Config | None) -> list[tables.Entry]:
    """A table that leaves the kernels no choice; None: the library's product."""
    if config is None:
        return [tables.Entry(key("library", product), None, tuning.LibraryConfig(0))]
    library = tables.Entry(key("library", product), None, tuning.LibraryConfig(rows))
    return [library, tables.Entry(key("rows" if rows == 1 else "tiles", product), rows, config)]


# ---------------------------------------------------------------------- in the compiling processes
def _compile_only() -> None:
    """From here on this process compiles what is launched, and launches nothing."""
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = warm_up


def _compile(product: Product, rows: int, config: Config, dtype: torch.dtype) -> str | None:
    """On tensors without memory, into Triton's cache. → what is wrong with it."""
    call = product_call(product, _operands(product, rows, dtype, torch.device("meta"), 1))
    try:
        with kernels.force("triton"), tuning.using(_only(product, rows, config)):
            call(0)
    except Exception as error:  # a compiler may fail in any way: the candidate is out, and the reason is told
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


# ---------------------------------------------------------------------- what is launched
class Case:
    """A product on as many copies of its weights as pass the caches, and what its results must be."""

    def __init__(
        self,
        product: Product,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        num_copies: int | None = None,
    ) -> None:
        self.product, self.rows = product, rows
        self.num_copies = num_copies or max(3, min(64, -(-_ROTATED_BYTES // product.weight_bytes)))
        self._tolerance = TOLERANCE[dtype]
        operands = _operands(product, rows, dtype, device, self.num_copies)
        self.call = product_call(product, operands)
        # two inputs, so that what one result left in memory is not the other's
        self._operands = [_operands(product, rows, dtype, device, 0)[:3] + (operands[3][:1],) for _ in range(2)]
        with kernels.force("reference"):
            self._expected = [self._result(_in_float32(one)) for one in self._operands]

    def _result(self, operands: "Operands") -> Tensor:
        x, residual, norm_weight, weights = operands
        return product_call(self.product, (x, residual.clone(), norm_weight, weights))(0)

    def problem(self, repeats: int = 1) -> str | None:
        """What is wrong with the results of the configuration in use; None: nothing."""
        for operands, expected in [*zip(self._operands, self._expected, strict=True)] * repeats:
            error = relative_error(self._result(operands), expected)
            if not error <= self._tolerance:
                return f"its result differs from the reference by {error:.2g}"
        return None


Operands = tuple[Tensor, Tensor, Tensor, list[Tensor]]  # x [rows, K], residual [rows, N], norm weight [K], weights


def _operands(product: Product, rows: int, dtype: torch.dtype, device: torch.device, copies: int) -> Operands:
    """Normal: zeros would be multiplied faster."""
    n, k = product.num_out, product.num_in

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty if device.type == "meta" else empty.normal_(0, scale)

    weights = [normal(n * (2 if product.paired else 1), k, scale=k**-0.5) for _ in range(copies)]
    return normal(rows, k), normal(rows, n), normal(k), weights


def _in_float32(operands: Operands) -> Operands:
    x, residual, norm_weight, weights = operands
    return x.float(), residual.float(), norm_weight.float(), [weight.float() for weight in weights]


def product_call(product: Product, operands: Operands) -> Callable[[int], Tensor]:
    """call(i): the product's op on the i-th of the weights."""
    x, residual, norm_weight, weights = operands
    op: Callable[..., Tensor] = getattr(kernels, product.op)
    if product.op == "add_linear_":
        return lambda i: op(residual, x, weights[i])
    return lambda i: op(x, norm_weight, _EPS, weights[i])
