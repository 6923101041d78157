"""Calibration text out of files: what each form becomes, and what is said of a wrong one."""

import json
from pathlib import Path

import pytest

from lmtool.errors import ConfigError
from lmtool.quant.datasets import calibration_ids
from lmtool.quant.options import CalibrationOptions
from lmtool.tokenizer import Tokenizer, load_tokenizer
from tests.quant.models import tiny_folder

MESSAGES = [{"role": "user", "content": "the quick brown fox"}, {"role": "assistant", "content": "jumps over"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("model")))


def all_text(path: Path, tokenizer: Tokenizer) -> str:
    """The text of the longest single sample that the file gives."""
    for seqlen in range(200, 1, -1):
        try:
            ids = calibration_ids(CalibrationOptions(dataset=str(path), samples=1, seqlen=seqlen), tokenizer)
        except ConfigError:
            continue
        return tokenizer.decode(ids[0].tolist(), skip_special=False)
    raise AssertionError("no text")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "the quick brown fox", "the quick brown fox\n\n"),
        ("a.md", "the quick brown fox", "the quick brown fox\n\n"),
        ("a.jsonl", '{"text": "the lazy"}\n\n"brown fox"\n', "the lazy\n\nbrown fox\n\n"),
        ("a.json", json.dumps(["the lazy dog", {"content": "fox"}]), "the lazy dog\n\nfox\n\n"),
        ("a.json", json.dumps(MESSAGES), "the quick brown foxjumps over"),
        ("a.jsonl", json.dumps({"messages": MESSAGES}), "the quick brown foxjumps over"),
        ("a.json", json.dumps([{"conversations": MESSAGES}, MESSAGES]), "the quick brown foxjumps over" * 2),
    ],
)
def test_forms(name: str, content: str, expected: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / name).write_text(content)
    assert all_text(tmp_path / name, tokenizer) == expected


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("the quick")
    (tmp_path / "a.txt").write_text("brown fox")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert all_text(tmp_path, tokenizer) == "brown fox\n\nthe quick\n\n"


def test_the_seed_says_which_stretches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(" ".join(str(i) for i in range(500)))

    def ids(seed: int) -> list[list[int]]:
        options = CalibrationOptions(dataset=str(tmp_path / "a.txt"), samples=4, seqlen=50, seed=seed)
        rows: list[list[int]] = calibration_ids(options, tokenizer).tolist()
        return rows

    assert ids(1) == ids(1) != ids(2)
    whole = tokenizer.encode((tmp_path / "a.txt").read_text(), add_special=False)
    starts = [next(i for i in range(len(whole)) if whole[i : i + 50] == row) for row in ids(1)]
    assert all(later - earlier >= 50 for earlier, later in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b", "is none of .txt, .md, .jsonl, .json"),
        ("a.txt", b"short", r"holds \d+ tokens, 2 of 50 are 100; give more text, or a shorter --calib-seqlen"),
        ("a.txt", b"a \xff\xfe", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl, line 2 is not JSON"),
        ("a.json", b'[{"words": "a"}]', r"a\.json, entry 1 holds neither a text nor messages; give"),
    ],
)
def test_refused(name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        calibration_ids(CalibrationOptions(dataset=str(tmp_path / name), samples=2, seqlen=50), tokenizer)


def test_an_empty_folder_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.txt, \.md, \.jsonl, \.json"):
        calibration_ids(CalibrationOptions(dataset=str(tmp_path), samples=2), tokenizer)
