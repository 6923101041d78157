"""What cannot run the engine is said in one line, with the way out: no driver, no such card, a card too old."""

from pathlib import Path

import pytest
import torch

from lmtool.engine import device
from lmtool.engine.device import choose_device, choose_dtype
from lmtool.errors import ConfigError, DeviceError, MemoryShortError
from tests.support import TINY


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch reports one card, a V100."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (7, 0),
        "get_device_name": "Tesla V100",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return monkeypatch


def test_a_card_too_old(card: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda:0", "auto"):
        with pytest.raises(DeviceError) as caught:
            choose_device(name)
        assert str(caught.value) == (
            "Tesla V100 has compute capability 7.0; 7.5 (Turing) or newer is needed; use --device cpu"
        )


def test_a_card_that_is_not_there(card: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"^--device cuda:1: there is 1 GPU; count from cuda:0$"):
        choose_device("cuda:1")


def test_a_card_without_room_for_a_context(card: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported …")

    card.setattr(torch.cuda, "get_device_capability", full)
    with pytest.raises(MemoryShortError, match=r"^--device cuda has no memory .*; close what else uses the card$"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("version", "message"),
    [("13.0", "torch finds no NVIDIA GPU or driver"), (None, "this torch is built without CUDA")],
)
def test_no_driver(card: pytest.MonkeyPatch, version: str | None, message: str) -> None:
    card.setattr(torch.cuda, "is_available", lambda: False)
    card.setattr(torch.version, "cuda", version)
    with pytest.raises(DeviceError, match=f"^--device cuda: {message}; use --device cpu, or see `lmtool check_env`$"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x"])
def test_a_device_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="--device .* give cpu, cuda or cuda:N"):
        choose_device(name)


def test_bfloat16_needs_ampere(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    card_0 = torch.device("cuda", 0)
    with pytest.raises(
        DeviceError, match="--dtype bfloat16 needs compute capability 8.0 or newer; use --dtype float16"
    ):
        choose_dtype("bfloat16", TINY, card_0)
    assert choose_dtype("auto", TINY, card_0) == torch.float16


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("memory.max", "memory.current", 600), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", 600)],
)
def test_a_container_has_no_more_memory_than_its_limit(
    limit: str, used: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("700\n")
    (tmp_path / used).with_name("memory.stat").write_text("active_file 9\ninactive_file 300\n")
    assert device.free_bytes(torch.device("cpu")) == free
    (tmp_path / limit).write_text("max\n")
    assert device.free_bytes(torch.device("cpu")) > 1 << 20  # the machine's
