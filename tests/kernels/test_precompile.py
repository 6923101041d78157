"""Kernels compiled ahead: a rehearsal on the meta device finds what real tensors need, and that alone is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.test_budget import KERNELS

pytestmark = pytest.mark.timeout(900)  # where Triton's cache is cold, on a machine that has other things to do


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = str(tmp_path_factory.mktemp("kernels"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.rehearsal"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr  # such as Triton's, of a default that is to change
    return json.loads(run.stdout)


def test_meta_tensors_are_specialised_for_as_real_ones_are(found: Any) -> None:
    assert (found["only_meta"], found["only_cpu"]) == ([], [])
    assert found["num_found"] > 30


def test_every_kernel_of_a_step_is_found(found: Any) -> None:
    """On Hopper no step of these models needs the two that serve 4-bit weights elsewhere; one card adds no ranks up."""
    assert set(found["kernels"]) >= KERNELS - {"wide_kernel", "_expand_kernel", "_add_all_reduce_kernel"}


def test_a_rehearsal_imports_no_compiler_of_torchs(found: Any) -> None:
    """They take seconds, which loading the weights would wait for."""
    assert found["imported"] == []


def test_each_variant_is_compiled_and_loaded_once(found: Any) -> None:
    assert found["told"] == [[1, 3], [2, 3], [3, 3]]
    assert found["loaded"] == ["_rms_norm_kernel", "_rms_norm_kernel", "_silu_mul_kernel"]


def test_a_kernel_that_the_card_does_not_take_is_named(found: Any) -> None:
    kind, message = found["refused"]
    assert kind == "DeviceError"
    assert message.startswith("_silu_mul_kernel cannot be compiled for this card: RuntimeError: Triton Error")
    assert "lmtool check_env" in message


def test_memory_that_is_short_is_known_as_such(found: Any) -> None:
    assert found["no_room"][0] == "OutOfMemoryError"
