"""Who serves an op, on cards that are not here: torch is told which card there is; the choice is the real one."""

import sys

import pytest
import torch

from lmtool import kernels
from lmtool.kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _forget():
    """What was found out about this machine's card is forgotten before and after."""
    answers = (dispatch._kind, dispatch._has_triton, dispatch._notice)
    for answer in answers:
        answer.cache_clear()
    yield
    for answer in answers:
        answer.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """card(7, 5): torch reports a card of this compute capability."""

    def give(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return give


def kind(*arguments):
    return kernels.implementation(*arguments).__name__.split(".")[-2]


def test_a_cpu_is_served_by_the_reference_and_force_overrides(card):
    card(9, 0)
    assert kind("norm", CPU) == "reference"
    assert kind("norm", CUDA) == "triton"
    with kernels.force("triton"):
        assert kind("norm", CPU) == "triton"
    with kernels.force("reference"):
        assert kind("norm", CUDA) == "reference"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_half_precision_is_served_by_triton_on_every_card(capability, card, caplog):
    card(*capability)
    assert {kind("attention", CUDA, HALF, d) for d in (64, 80, 96, 128, 256)} == {"triton"}
    assert kernels.is_capturable(CUDA, HALF, 128)
    assert not caplog.records


def test_what_a_card_cannot_do_falls_back_with_one_notice(card, caplog):
    card(7, 5)
    assert [kind(op, CUDA, BRAIN) for op in ("norm", "linear", "norm")] == ["reference"] * 3
    assert kind("attention", CUDA, BRAIN, 128) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "compute capability 7.5 does not multiply bfloat16 (use float16): what needs it runs in plain torch, slower"
    ]
    assert caplog.records[0].name.startswith("lmtool.")
    assert not kernels.is_capturable(CUDA, BRAIN, 128)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"), [(HALF, 512, "heads of 512"), (torch.float64, 64, "float64 is not among")]
)
def test_shapes_and_types_without_kernels_fall_back(dtype, head_dim, reason, card, caplog):
    card(9, 0)
    assert kind("attention", CUDA, dtype, head_dim) == "reference"
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_a_gpu_without_triton_is_told_what_to_install(card, monkeypatch, caplog):
    card(9, 0)
    monkeypatch.setitem(sys.modules, "triton", None)  # the import system's way to say: cannot be imported
    assert [kind(op, CUDA, HALF) for op in ("norm", "linear")] == ["reference"] * 2
    assert not kernels.is_capturable(CUDA, HALF, 128)
    assert len(caplog.records) == 1
    assert "pip install '.[gpu]' in lmtool's folder" in caplog.text


def test_on_a_cpu_nothing_is_said(caplog):
    assert kind("attention", CPU, BRAIN, 512) == "reference"
    assert not kernels.is_capturable(CPU, HALF, 128)
    assert not caplog.records
