"""Words of AWQ and GPTQ: written out by hand where it can be, and there and back."""

import pytest
import torch

from lmtool.checkpoint.packing import pack_awq, pack_gptq, unpack_awq, unpack_gptq


def _matrix(out_features: int, in_features: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=generator)
    scale = torch.rand((out_features, in_features // group), generator=generator).half()
    zero = torch.randint(0, 16, (out_features, in_features // group), dtype=torch.uint8, generator=generator)
    return codes, scale, zero


def _as_unsigned(words: torch.Tensor) -> list[list[str]]:
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in words.tolist()]


def test_awq_puts_even_columns_into_the_low_half() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]  # out feature n has the code n
    qweight, qzeros, scales = pack_awq(codes, torch.ones(8, 1).half(), 15 - codes)
    assert _as_unsigned(qweight) == [["75316420"]]
    assert _as_unsigned(qzeros) == [["8ace9bdf"]]
    assert scales.shape == (1, 8)


def test_gptq_packs_in_features_in_order_and_stores_zero_minus_one() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None].expand(8, 8)
    zero = torch.tensor([8, 1, 0, 15, 8, 8, 8, 8], dtype=torch.uint8)[:, None]
    qweight, qzeros, _ = pack_gptq(codes, torch.ones(8, 1).half(), zero)
    assert _as_unsigned(qweight) == [["76543210"] * 8]
    assert _as_unsigned(qzeros) == [["7777ef07"]]
    assert _as_unsigned(pack_gptq(codes, torch.ones(8, 1).half(), zero, offset=0)[1]) == [["8888f018"]]


@pytest.mark.parametrize(("out_features", "in_features", "group"), [(8, 32, 32), (24, 128, 64), (64, 384, 128)])
def test_there_and_back(out_features: int, in_features: int, group: int) -> None:
    matrix = _matrix(out_features, in_features, group)
    for pack, unpack in ((pack_awq, unpack_awq), (pack_gptq, unpack_gptq)):
        words = pack(*matrix)
        assert [part.dtype for part in words] == [torch.int32, torch.int32, torch.float16]
        for before, after in zip(matrix, unpack(*words), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_gptq_packs_8_bits_four_to_a_word() -> None:
    codes = torch.tensor([0x10, 0x32, 0x54, 0xF6], dtype=torch.uint8)[None].expand(4, 4)
    zero = torch.tensor([128, 1, 0, 255], dtype=torch.uint8)[:, None]
    qweight, qzeros, _ = pack_gptq(codes, torch.ones(4, 1).half(), zero, bits=8)
    assert _as_unsigned(qweight) == [["f6543210"] * 4]
    assert _as_unsigned(qzeros) == [["feff007f"]]


@pytest.mark.parametrize("offset", [0, 1])
def test_8_bits_there_and_back(offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (24, 128), dtype=torch.uint8, generator=generator)
    scale = torch.rand((24, 2), generator=generator).half()
    zero = torch.randint(0, 256, (24, 2), dtype=torch.uint8, generator=generator)
    words = pack_gptq(codes, scale, zero, bits=8, offset=offset)
    assert [tuple(part.shape) for part in words] == [(32, 24), (2, 6), (2, 24)]
    for before, after in zip((codes, scale, zero), unpack_gptq(*words, bits=8, offset=offset), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
