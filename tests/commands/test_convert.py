"""`lmtool convert` and `inspect` as they are typed, in both generations of LMDeploy's spelling, and who reads it."""

import io
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lmtool import cli
from lmtool.bench import limits
from tests.convert.test_refusals import contents, refused
from tests.models.test_quantized import quantize
from tests.quant.models import text_file, tiny_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    tiny_folder(Path("model"))
    quantize(tiny_folder(Path("quantized"), intermediate_size=128), "awq")


def run(line: str) -> None:
    assert cli.main(line.split()[1:]) == 0


def test_the_course_s_lines(capsys: pytest.CaptureFixture[str]) -> None:
    run("lmtool convert chatml ./model")
    run("lmtool convert chatml ./quantized --model-format awq --group-size 32 --dst_path ./workspace_quant")
    run("lmtool convert --model_format hf --model ./model --dst_path ./w --tp 2")
    capsys.readouterr()
    answers = []
    for path in ("./workspace", "./workspace/triton_models/weights/", "./workspace/triton_models/weights"):
        run(f"lmtool chat turbomind {path} --prompt a --max-new-tokens 5 --json")
        answers.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(answers)) == 1
    run("lmtool chat ./workspace_quant --prompt a --show-prompt")
    assert "<|im_start|>user\na<|im_end|>" in capsys.readouterr().out


def test_what_was_made_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("lmtool convert ./quantized --json")
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == "workspace"
    assert found["quantization"] == {"weights": {"w4": 12}, "group_sizes": [32], "source_group_size": 32}
    assert found["exact"]
    assert found["check"] == {"equal": True, "relative": 0.0, "same_top": 1.0}
    run("lmtool convert ./workspace --to hf -o hf --json")
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["tensors"]) == ("awq", len(load_file("hf/model.safetensors")))
    run("lmtool convert ./workspace --to gguf -o my.gguf --json")
    assert json.loads(capsys.readouterr().out)["type"] == "Q4_1"


def test_inspect_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run("lmtool convert ./quantized")
    capsys.readouterr()
    run("lmtool inspect ./workspace --context 100 --concurrency 3 --json")
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["source"], found["verified"]) == ("lmtool", "./quantized", True)
    assert found["model"]["num_layers"] == 3
    # 2 · 3 layers · 2 heads · 16 of float16 a token; 3 · 2 blocks of 64 tokens, and the block of nobody
    assert found["memory"]["cache_per_token"] == 2 * 3 * 2 * 16 * 2
    assert found["memory"]["cache"] == (3 * 2 + 1) * 64 * found["memory"]["cache_per_token"]
    run("lmtool inspect ./workspace")
    assert "every byte is the one that was written" in capsys.readouterr().out
    for path, said in (("./model", "float32"), ("./quantized", "int4, groups of 32")):
        run(f"lmtool inspect {path}")
        assert said in capsys.readouterr().out


def test_weights_and_tokenizer_from_two_places(capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        Path("quantized", file).unlink()
    assert "holds no tokenizer" in refused(capsys, "convert", "./quantized")
    run("lmtool convert ./model --quant-path ./quantized --dst-path a")
    run("lmtool convert ./quantized --tokenizer-path ./model --dst-path b")
    assert contents(Path("a"))["tokenizer.json"] == contents(Path("b"))["tokenizer.json"]
    assert load_file("a/weights-00001.safetensors").keys() == load_file("b/weights-00001.safetensors").keys()


def test_lite_reads_a_workspace_as_it_reads_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    text_file(Path("text.txt"), repeats=60)
    run("lmtool convert ./model")
    for source in ("./model", "./workspace"):
        run(
            f"lmtool lite auto_awq {source} --work-dir {source}-awq --w-group-size 32 --calib-dataset text.txt "
            "--calib-samples 3 --calib-seqlen 32 --eval-windows 0"
        )
    first, second = (load_file(f"{source}-awq/model.safetensors") for source in ("./model", "./workspace"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    run("lmtool convert ./quantized --dst-path q")
    line = refused(capsys, "lite", "auto_awq", "./q", "--work-dir", "x", "--method", "rtn", "--w-group-size", "32")
    assert "is quantized already" in line


def test_bench_runs_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_CPU_BUFFER_BYTES", 8 << 20)  # the machine's limits in milliseconds
    monkeypatch.setattr(limits, "_CPU_MATMUL_SIZE", 128)
    monkeypatch.setattr(limits, "_LEAST_S", 0)
    run("lmtool convert ./model")
    Path("workspace/engine.toml").write_text("max_batch_size = 2\n")
    run(
        "lmtool bench offline --model ./workspace --device cpu --batches 1,3 --input-len 8 --output-len 4 "
        "--prefill-len 16 --repeats 1 --json out.json"
    )
    assert json.loads(Path("out.json").read_text())["settings"]["engine"]["max_batch_size"] == 2


@pytest.mark.parametrize(
    "line", ["convert ./model --warm", "convert a b c", "convert", "convert chatml model --chat-template x"]
)
def test_what_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, *line.split())
    assert not Path("workspace").exists()
