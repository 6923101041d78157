"""The arithmetic of limits against the published tables of perf.md §2 (4.3 TB/s, 790 TFLOP/s, fp16)."""

import pytest
import torch

from lmtool.bench import limits, workloads
from lmtool.bench.roofline import Cost, Work, decode_step, ideal_run, model_cost
from lmtool.bench.runs import Run
from lmtool.bench.shapes import SHAPES, find_shape
from lmtool.bench.workloads import Size, Workload
from lmtool.errors import ConfigError

H200 = (4.3e12, 790e12)


def _cost(shape: str) -> Cost:
    cost = model_cost(SHAPES[shape], "float16", 2)
    assert cost is not None
    return cost


@pytest.mark.parametrize(
    ("shape", "params", "gbytes", "tokens_per_s"),
    [
        ("smollm2-135m", 0.135e9, 0.27, 15_983),
        ("qwen2.5-0.5b", 0.494e9, 0.99, 4_352),
        ("internlm2-1_8b", 1.889e9, 3.40, 1_265),
        ("llama2-7b", 6.738e9, 13.21, 325),
        ("llama3-8b", 8.030e9, 15.01, 286),
    ],
)
def test_batch_1_floor(shape: str, params: float, gbytes: float, tokens_per_s: float) -> None:
    assert SHAPES[shape].num_parameters == pytest.approx(params, rel=0.005)
    cost = _cost(shape)
    assert cost.weight_bytes / 1e9 == pytest.approx(gbytes, abs=0.006)
    assert H200[0] / cost.weight_bytes == pytest.approx(tokens_per_s, rel=0.005)


@pytest.mark.parametrize(
    ("shape", "kibytes"),
    [("smollm2-135m", 22.5), ("qwen2.5-0.5b", 12), ("internlm2-1_8b", 96), ("llama2-7b", 512), ("llama3-8b", 128)],
)
def test_kv_bytes_per_token(shape: str, kibytes: float) -> None:
    assert _cost(shape).kv_bytes_per_token == kibytes * 1024


@pytest.mark.parametrize(
    ("shape", "batch", "tokens_per_s"),
    [
        ("qwen2.5-0.5b", 1, 4_297),
        ("internlm2-1_8b", 64, 28_000),
        ("llama2-7b", 32, 4_527),
        ("llama3-8b", 32, 7_128),
        ("llama3-8b", 128, 17_100),
    ],
)
def test_decode_at_a_context_of_1024(shape: str, batch: int, tokens_per_s: float) -> None:
    """Table C up to 128 rows; beyond, it overlaps the matrices' operations with the cache's bytes, and we do not."""
    step = decode_step(_cost(shape), batch, 1024)
    assert batch / step.duration_s(*H200) == pytest.approx(tokens_per_s, rel=0.005)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "ms"),
    [("llama3-8b", 1024, 18.4), ("llama3-8b", 8192, 167), ("llama3-8b", 32768, 935), ("internlm2-1_8b", 8192, 39.7)],
)
def test_prefill_floor(shape: str, num_tokens: int, ms: float) -> None:
    run, _ = ideal_run(
        workloads.prefill(num_tokens), _cost(shape), *H200, max_batch_size=1, max_batched_tokens=num_tokens
    )
    assert run.duration_s * 1e3 == pytest.approx(ms, rel=0.01)


def test_chat1000_on_a_machine_without_overhead() -> None:
    """Issue 3: about 270 and 85 requests/s at the ceilings of measured-h200.md."""
    for shape, requests_per_s in (("internlm2-1_8b", 270), ("llama3-8b", 85)):
        run, _ = ideal_run(workloads.chat(), _cost(shape), 4.46e12, 757e12, max_batch_size=256, max_batched_tokens=8192)
        assert run.metrics()["requests_per_s"] == pytest.approx(requests_per_s, rel=0.05)


def test_int4_of_a_gguf_and_what_is_not_known() -> None:
    """perf.md §6: SmolLM2 has 0.106 G weights in layers; at 5 bits, and 28 M in the head at 8."""
    cost = model_cost(SHAPES["smollm2-135m"], "int4", 4)
    assert cost is not None
    assert cost.weight_bytes == pytest.approx(0.1062e9 * 5 / 8 + 0.0283e9, rel=0.002)
    assert model_cost(SHAPES["smollm2-135m"], "int3", 4) is None


UNIT = Cost(weight_bytes=100, kv_bytes_per_token=1, flops_per_token=10, flops_per_logits=3, flops_per_pair=0)


def _steps(workload: Workload, **policy: int) -> tuple[Run, Work]:
    return ideal_run(workload, UNIT, 1.0, 1e9, **{"max_batch_size": 8, "max_batched_tokens": 64, **policy})


def test_every_byte_and_operation_of_a_small_run() -> None:
    """2 requests, 3 in and 2 out: a prefill that reads 2 x 3 tokens, a decode that reads 2 x 4."""
    run, work = _steps(Workload("two", (Size(3, 2),) * 2))
    assert [(step.duration_s, step.num_tokens, step.prefill) for step in run.steps] == [
        (106.0, 2, True),
        (108.0, 2, False),
    ]
    assert work == Work(matrix_bytes=200, matrix_flops=8 * 10 + 4 * 3, attention_bytes=6 + 8)
    assert (work.num_bytes, work.flops) == (214, 92)
    assert run.metrics() == {
        "output_tokens_per_s": 4 / 214,
        "requests_per_s": 2 / 214,
        "time_to_first_token_s": 106,
        "prefill_tokens_per_s": 6 / 106,
        "decode_tokens_per_s": 2 / 108,
    }


def test_the_token_budget_cuts_prompts_and_the_batch_size_makes_others_wait() -> None:
    run, _ = _steps(Workload("long", (Size(100, 2),)), max_batched_tokens=64)
    assert [step.num_tokens for step in run.steps] == [0, 1, 1]
    assert [step.prefill for step in run.steps] == [True, True, False]
    run, _ = _steps(Workload("three", (Size(2, 2),) * 3), max_batch_size=2)
    assert [step.num_tokens for step in run.steps] == [2, 2, 1, 1]
    assert list(run.first_token_s) == [0, 1, 2]


def test_a_shared_prefix_is_computed_once() -> None:
    _, shared = _steps(Workload("shared", (Size(20, 1, num_shared_tokens=16),) * 3))
    assert shared.flops == (20 + 4 + 4) * 10 + 3 * 3


def test_a_window_bounds_what_is_read() -> None:
    windowed = Cost(
        weight_bytes=0, kv_bytes_per_token=1, flops_per_token=0, flops_per_logits=0, flops_per_pair=1, sliding_window=8
    )
    assert decode_step(windowed, 2, 100) == Work(attention_bytes=2 * 9, attention_flops=2 * 8)


def test_kernels_run_one_after_another() -> None:
    """Matrices bound by operations (5 s), attention bound by bytes (7 s): 12 s, more than either limit alone."""
    work = Work(matrix_bytes=1, matrix_flops=50, attention_bytes=7, attention_flops=10)
    assert work.duration_s(bytes_per_s=1, flops_per_s=10) == 12


def test_unknown_shape() -> None:
    with pytest.raises(
        ConfigError, match=r"--shape 'llama3' is not known; did you mean llama3-8b\? there are llama3-8b,"
    ):
        find_shape("llama3")


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_CPU_BUFFER_BYTES", 32 << 20)
    monkeypatch.setattr(limits, "_CPU_MATMUL_SIZE", 256)
    monkeypatch.setattr(limits, "_LEAST_S", 0)
    found = limits.measure(torch.device("cpu"))
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.matmul_flops_per_s < 1e15
    assert found.matmul_dtype in ("float32", "bfloat16")
    assert found.launch_gap_s is None
    assert "cores" in found.device


@pytest.mark.gpu
def test_a_card_is_measured() -> None:
    found = limits.measure(torch.device("cuda"))
    assert found.read_bytes_per_s > 1e11
    assert found.matmul_flops_per_s > 1e13
    assert found.launch_gap_s is not None
    assert 1e-7 < found.launch_gap_s < 2e-5
