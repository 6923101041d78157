"""`lmtool bench kernels`: every op is there, right before it is timed, and its bytes are those it cannot do without."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtool import cli, kernels
from lmtool.bench import kernel_session, limits, shapes
from lmtool.bench.kernel_cases import GROUPS, cases
from lmtool.bench.kernel_maker import Case, Maker
from lmtool.bench.kernel_session import check
from lmtool.errors import KernelError, MemoryShortError
from lmtool.kernels import dispatch
from tests.bench.test_offline import LIMITS
from tests.kernels.test_doors import OPS
from tests.support import TINY

CPU = torch.device("cpu")
ON_A_CARD = os.environ.get("TRITON_INTERPRET") == "0"


def _maker(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Maker:
    return Maker(TINY, dtype, device, context=70)


def _case(op: str, detail: str = "", **settings: Any) -> Case:
    return next(case for case in cases(_maker(**settings), [3]) if case.op == op and detail in case.detail)


def test_every_op_behind_the_door_is_measured() -> None:
    found = list(cases(_maker(), [1, 5]))
    assert {case.op for case in found} == set(OPS) - {"add_all_reduce_"}, (
        "which takes several GPUs: benchmarks.gpu_ranks"
    )
    assert {case.group for case in found} == set(GROUPS)
    names = [case.name for case in found]
    assert len(names) == len(set(names))
    assert {case.rows for case in found} == {1, 5, 70}, "a prompt has as many rows as tokens"


@pytest.mark.parametrize(
    "kind",
    ["reference", pytest.param("triton", marks=pytest.mark.skipif(ON_A_CARD, reason="Triton is not interpreted"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_op_is_right_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    """Triton's ops too, in the interpreter, against the reference in float32."""
    torch.manual_seed(0)
    with kernels.force(kind), torch.inference_mode():
        for case in cases(_maker(dtype), [3]):
            if kind == "triton" and case.group == "kv":
                continue  # minutes in the interpreter, and tests/kernels has them
            error = check(case, case.make(), dtype)
            assert error < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_op_is_right_and_timed_on_a_card(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    wanted = list(cases(_maker(dtype, device), [1, 3, 40]))
    for result in kernel_session.measure(wanted, dtype, device, LIMITS):
        assert 1e-7 < result["metrics"]["time_s"]["median"] < 1e-2, result["name"]


def test_a_rank_s_part_of_a_model_has_its_share_of_every_matrix() -> None:
    whole, part = (shapes.products(shapes.part_of("llama3-8b", tp)) for tp in (1, 4))
    assert [(one.num_out, one.num_in) for one in part] == [
        (1536, 4096), (4096, 1024), (3584, 4096), (4096, 3584), (32064, 4096)
    ]  # fmt: skip
    assert sum(one.num_weights for one in whole) == 4 * sum(one.num_weights for one in part)


def test_bytes_and_operations_are_counted_once() -> None:
    hidden, inner, size = 64, 112, 4
    gate_up = _case("norm_linear_silu")
    assert gate_up.num_bytes == size * (2 * inner * hidden + 3 * hidden + 3 * inner)
    assert gate_up.flops == 2 * 3 * 2 * inner * hidden
    down = _case("add_linear_", "down")
    assert down.num_bytes == size * (hidden * inner + 3 * inner + 2 * 3 * hidden), "the sum is read and written"
    decode = _case("attention_decode")
    assert decode.num_bytes == 3 * 70 * 2 * 2 * 16 * size + 2 * 3 * 64 * size
    assert decode.flops == 4 * 3 * 64 * 70
    assert _case("attention_prefill").flops == 4 * 64 * 70 * 71 / 2
    assert _case("sample", dtype=torch.float16).num_bytes == 3 * TINY.vocab_size * 2


def test_the_librarys_product_is_that_of_the_op() -> None:
    case = _case("add_linear_", "down")
    residual, x, weight = case.make()
    assert case.library is not None
    expected = residual + case.library(residual, x, weight)
    torch.testing.assert_close(kernels.add_linear_(residual, x, weight), expected)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_result_ends_the_command(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = _case("rms_norm"), kernels.rms_norm

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        is_reference = dispatch._forced.get() == "reference"
        return right(x, weight, eps) * (1 if is_reference else factor)

    monkeypatch.setattr(kernels, "rms_norm", wrong)
    with pytest.raises(KernelError, match=r"rms_norm b3 is wrong: it differs from the reference by (0\.0|nan)"):
        check(case, case.make(), torch.float32)


def test_one_sampled_row_in_64_may_fall_on_the_other_side_of_a_tie() -> None:
    case = replace(_case("sample", "greedy"), rows=64)
    expected = torch.arange(64)
    one, two = expected.clone(), expected.clone()
    one[3], two[3:5] = 0, 0
    assert kernel_session._error(one, expected, case) == 0
    assert kernel_session._error(two, expected, case) == 2 / 64
    assert kernel_session._error(one, expected, replace(case, op="advance_")) > 0


def test_what_does_not_fit_is_refused_before_it_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_session, "free_bytes", lambda device: 50_000)
    with pytest.raises(MemoryShortError, match=r"norm_linear head 211×64 b3 needs .* give smaller --rows"):
        kernel_session.measure([_case("norm_linear", "head")], torch.float32, CPU, LIMITS)


def test_sets_pass_the_caches_and_small_ones_are_few() -> None:
    case = _case("norm_linear", "head")
    assert kernel_session._num_sets(case, (torch.empty(100 << 20, dtype=torch.int8),), CPU) == 3
    assert kernel_session._num_sets(case, (torch.empty(1),), CPU) == 96


# ---------------------------------------------------------------------- the command
@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(limits, "_CPU_BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr(limits, "_CPU_MATMUL_SIZE", 128)
    monkeypatch.setattr(limits, "_LEAST_S", 0)
    monkeypatch.setattr(kernel_session.timing, "_CPU_LEAST_S", 0.0)
    monkeypatch.setattr(kernel_session, "_MOST_SETS", {"cpu": 2})


@pytest.mark.usefixtures("_small")
def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "kernels.json", tmp_path / "kernels.png"
    line = "bench kernels --shape tiny --device cpu --dtype float32 --rows 1,3 --context 70"
    assert cli.main([*line.split(), "--json", str(files[0]), "--png", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert "reference ops in plain torch" in out
    values = json.loads(files[0].read_text())
    assert values["settings"]["kernels"] == "reference"
    assert values["settings"]["plan"]["rows"] == [1, 3]
    assert {"torch", "python"} <= set(values["versions"])
    assert len(values["results"]) == len(list(cases(_maker(), [1, 3])))
    for result in values["results"]:
        assert result["name"] in out
        time = result["metrics"]["time_s"]
        assert time["ratio"] == pytest.approx(time["limit"] / time["median"])
        assert time["best"] <= time["median"]
        assert ("library_s" in result["metrics"]) == (result["group"] == "linear")
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert cli.main(["bench", "report", str(files[0])]) == 0
    assert "library / ours" in capsys.readouterr().out


@pytest.mark.usefixtures("_small")
def test_only_some_and_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    line = "bench kernels --shape tiny --device cpu --rows 2 --context 70 --only norm,step --json -"
    assert cli.main(line.split()) == 0
    captured = capsys.readouterr()
    names = [result["name"] for result in json.loads(captured.out)["results"]]
    assert names == ["rms_norm b2", "silu_mul b2", "step_rows b2", "advance_ b2"]
    assert "of the limit" in captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--shape llama9", "--shape 'llama9' is not known"),
        ("--only norms", "--only 'norms' is not known; give some of linear, w4, norm, rope"),
        ("--rows 0", "--rows has 0; give 1 or more"),
        ("--rows a", "--rows is 'a'; give numbers"),
        ("--context 1", "--context is 1; give 2 or more"),
        ("--dtype int3", "--dtype is 'int3'"),
        ("--json /no/such/x.json", "there is no folder /no/such"),
        ("--tune --device cpu", "--tune measures kernels of an NVIDIA GPU"),
        ("--tune --rows 1,65", "--rows has 65; --tune is for the kernels of 1 to 64 rows"),
        ("--tune --shape llama3-8b,x", "--shape 'x' is not known"),
        ("--tune --only norm", "leave --only and --png out"),
        ("--tune-file x.json", "--tune-file was given without --tune; add --tune"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
