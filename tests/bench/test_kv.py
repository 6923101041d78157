"""`lmtool bench kv`: each row in a process of its own, its JSON, its table and its picture; what is refused."""

import json
from pathlib import Path

import pytest

from lmtool import cli
from lmtool.bench import kv_table
from lmtool.bench.kv_prompts import read_prompts, subject_of
from lmtool.bench.kv_table import rows
from lmtool.errors import ConfigError, InputError
from tests.quant.models import run, text_file, tiny_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", model_type="llama")


def test_the_table_of_a_model_in_numbers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("What is a cache?\n\nAnd a longer one, which is cut?" + " more" * 90 + "\n")
    line = f"bench kv --model {model} --prompts {tmp_path}/prompts.txt --context 96 --output-len 8"
    files = f"--json {tmp_path}/kv.json --png {tmp_path}/kv.png"
    assert cli.main(f"{line} {files}".split()) == 0
    shown = capsys.readouterr()
    assert [name for name in ("engine", "+ KV int8", "transformers", "+ W4A16") if name in shown.out][
        -1
    ] == "transformers"
    assert "give --quantized MODEL" in " ".join(shown.err.split())
    seen = {row["name"]: row for row in json.loads((tmp_path / "kv.json").read_text())["rows"]}
    assert seen["engine"]["per_token_bytes"] == 3 * 2 * 2 * 16 * 4
    assert seen["+ KV int8"]["per_token_bytes"] == 3 * 2 * (2 * 32 + 8)  # heads of 16 are filled up to 32
    assert all(row["decode_tokens_per_s"] > 0 for row in seen.values())
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")


def test_what_transformers_cannot_load_is_told_and_the_rest_stays(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "unknown")  # its config names no model_type
    subject, dense = subject_of(str(model), None, None, 128, 64, 8, "cpu", "auto")
    wanted = rows(subject, {"device": "cpu", "dtype": "auto"}, [[1, 2, 3]], dense_dtype=dense)
    seen, missing = kv_table.run([wanted[0], wanted[-1]], lambda name: None)
    assert [one.name for one in seen] == ["engine"]
    assert len(missing) == 1
    assert "row 'transformers': --against transformers: it cannot load" in missing[0]


def test_rows_and_prompts(model: Path, tmp_path: Path) -> None:
    four_bits = tmp_path / "w4"
    run(model, four_bits, text_file(tmp_path / "text.txt"), method="rtn", group_size=32)
    subject, dense = subject_of(str(model), str(four_bits), None, 128, 64, 8, "cpu", "auto")
    (tmp_path / "prompts.txt").write_text("a cache\n" + "more " * 200)
    prompts = read_prompts(subject, tmp_path / "prompts.txt")
    assert len(prompts[0]) < 56 == len(prompts[1])
    wanted = rows(subject, {"device": "cpu", "dtype": "auto"}, prompts, dense_dtype=dense)
    assert [(row.name, row.model, row.engine["kv_dtype"], row.engine["dtype"]) for row in wanted] == [
        ("engine", str(model), "model", "float32"),
        ("+ W4A16", str(four_bits), "model", "auto"),
        ("+ KV int8", str(model), "int8", "float32"),
        ("+ both", str(four_bits), "int8", "auto"),
        ("transformers", str(model), "model", "float32"),
    ]
    assert all(row.engine["session_len"] == 64 for row in wanted)


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    def subject(**changed: object):  # noqa: ANN202
        given = {"model": str(model), "quantized": None, "shape": None, "group_size": 128, "context": 64}
        return subject_of(**{**given, "output_len": 8, "device": "cpu", "dtype": "auto", **changed})[0]  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="holds no 4-bit weights"):
        subject(quantized=str(model))
    with pytest.raises(ConfigError, match="--output-len is 64; give 2 or more, less than --context 64"):
        subject(output_len=64)
    with pytest.raises(ConfigError, match="--context is 500, the model's is 128"):
        read_prompts(subject(context=500), None)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(subject(), tmp_path / "empty.txt")
