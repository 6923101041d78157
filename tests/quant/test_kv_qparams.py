"""`lite kv_qparams` as the course types it: its formulas, who shares a scale, whose parameters they are."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool import cli
from lmtool.bench.evaluate import evaluate, spread
from lmtool.checkpoint.engine_file import under_engine_file
from lmtool.checkpoint.kv_parameters import KV_FILE
from lmtool.config import EngineConfig
from lmtool.engine.load_weights import open_decoder
from lmtool.engine.setup import load_engine
from lmtool.errors import CheckpointError, ConfigError
from lmtool.quant.kv_qparams import kv_qparams
from lmtool.tokenizer import load_tokenizer
from tests.quant.models import text_file, tiny_folder
from tests.support import request, run_all
from tests.tokenizer_files import SENTENCES

CALIBRATE = "lite calibrate --model model --calib_dataset text.txt --calib_samples 5 --calib_seqlen 32 --work_dir out"
QPARAMS = "lite kv_qparams --work_dir out --turbomind_dir workspace/triton_models/weights/"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_folder(tmp_path / "model")
    text_file(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    assert lmtool("convert model --no-check") == 0
    assert lmtool(CALIBRATE) == 0
    return tmp_path


def lmtool(line: str) -> int:
    return cli.main(line.split())


def parameters(here: Path) -> dict[str, torch.Tensor]:
    return load_file(here / "workspace" / KV_FILE)


def test_the_course_s_line_and_its_formulas(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lmtool(f"{QPARAMS} --kv_sym False --num_tp 1") == 0
    assert "each tensor, calibrated on 32 tokens: use them with --quant-policy 8" in capsys.readouterr().out
    seen, found = load_file(here / "out" / "calibration" / "key_value.safetensors"), parameters(here)
    for name in ("layers.0.k", "layers.2.v"):
        low, high = seen[f"{name}.min"].min(), seen[f"{name}.max"].max()
        assert found[f"{name}.scale"].shape == (2, 16)
        torch.testing.assert_close(found[f"{name}.scale"], ((high - low) / 255).expand(2, 16))
        torch.testing.assert_close(found[f"{name}.zero"], ((high + low) / 2).expand(2, 16))
    assert lmtool(f"{QPARAMS} --kv_sym True") == 0
    found = parameters(here)
    largest = seen["layers.1.k.absmax"].max()
    torch.testing.assert_close(found["layers.1.k.scale"], (largest / 127).expand(2, 16))
    assert not found["layers.1.k.zero"].any()


@pytest.mark.parametrize(
    ("flags", "distinct"),
    [("--granularity tensor", 1), ("--num_tp 2", 2), ("--granularity head", 2), ("--granularity channel", 32)],
)
def test_who_shares_a_scale(here: Path, flags: str, distinct: int) -> None:
    assert lmtool(f"{QPARAMS} {flags}") == 0
    assert len(parameters(here)["layers.0.v.scale"].unique()) == distinct


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_engine_loses_little_with_them(here: Path, granularity: str) -> None:
    workspace = here / "workspace"
    kv_qparams(here / "out", workspace, symmetric=False, granularity=granularity, num_tp=1)
    ids = load_tokenizer(here / "model").encode(" ".join(SENTENCES * 20))
    windows = spread(torch.tensor(ids), 2, 30)
    config = EngineConfig(device="cpu", dtype="float32", quant_policy=8)
    lost = evaluate(workspace, windows, config, against=workspace, chunk_tokens=8)
    assert lost.kl is not None
    assert 1e-9 < lost.kl.value < 2e-3
    loaded = load_engine(workspace, config)
    assert loaded.plan.scheme == "static"
    loaded.core.close()


def test_policy_4_of_a_workspace_that_has_them_is_what_the_course_meant(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    workspace = here / "workspace"
    (workspace / "engine.toml").write_text("quant_policy = 4\n")
    assert under_engine_file(EngineConfig(), workspace).kv_choice == "int4"
    assert lmtool(QPARAMS) == 0
    for _ in range(2):
        assert under_engine_file(EngineConfig(), workspace).kv_choice == "static"
    assert under_engine_file(EngineConfig(quant_policy=4), workspace).kv_choice == "int4"
    assert under_engine_file(EngineConfig(quant_policy=8), workspace).kv_choice == "static"
    assert under_engine_file(EngineConfig(kv_dtype="int8"), workspace).kv_choice == "int8"
    assert under_engine_file(EngineConfig(quant_policy=0), workspace).kv_choice == "model"
    assert capsys.readouterr().err.count("quant_policy 4 is read as static int8") == 1


def test_a_session_longer_than_calibrated_is_warned_about(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EngineConfig(device="cpu", kv_dtype="static")
    assert lmtool(f"{QPARAMS} --granularity channel") == 0
    open_decoder(here / "workspace", config)
    assert "calibrated on 32 tokens, a session holds 128" in capsys.readouterr().err
    assert lmtool(QPARAMS) == 0
    open_decoder(here / "workspace", config)
    assert "calibrated on 32" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--num_tp 3", "--num-tp is 3, the model has 2 key/value heads; give a divisor or a multiple of 2"),
        ("--num_tp 0", "--num-tp is 0"),
        ("--granularity row", "--granularity is 'row'; give one of tensor, head, channel"),
        ("--work_dir nowhere", "nowhere holds no calibration; lmtool lite calibrate MODEL --work-dir nowhere"),
        ("--turbomind_dir model", "model is no workspace; make one first: lmtool convert MODEL"),
    ],
)
def test_what_cannot_be_is_refused(here: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lmtool(f"{QPARAMS} {line}") == 2
    assert said in capsys.readouterr().err
    assert not (here / "workspace" / KV_FILE).exists()


def test_parameters_of_another_model_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lmtool(QPARAMS) == 0
    tiny_folder(here / "smaller", num_hidden_layers=2)
    tiny_folder(here / "other", rms_norm_eps=1e-6)
    tensors = load_file(here / "other" / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, here / "other" / "model.safetensors")
    for name, said in (
        ("smaller", "3 layers of [2, 16], this one has 2 of [2, 16]"),
        ("other", "its last norm differs"),
    ):
        assert lmtool(f"convert {name} --dst-path {name}_ws --no-check") == 0
        shutil.copy(here / "workspace" / KV_FILE, here / f"{name}_ws" / KV_FILE)
        with pytest.raises(CheckpointError, match="parameters of another model") as refused:
            open_decoder(here / f"{name}_ws", EngineConfig(device="cpu", quant_policy=8))
        assert said in str(refused.value)
        capsys.readouterr()
        assert lmtool(f"lite kv_qparams --work_dir out --turbomind_dir {name}_ws") == 2
        assert "another model" in capsys.readouterr().err


def test_other_ranks_damage_and_absence_are_refused(here: Path) -> None:
    workspace, config = here / "workspace", EngineConfig(device="cpu", kv_dtype="static")
    with pytest.raises(ConfigError, match="brings no parameters for it; write them into a workspace"):
        open_decoder(workspace, config)
    assert lmtool(f"{QPARAMS} --num_tp 2") == 0
    with pytest.raises(
        ConfigError, match="are for --tp 2, this engine has --tp 1; make them again: lmtool lite kv_qparams --num-tp 1"
    ):
        open_decoder(workspace, config)
    (workspace / KV_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"kv_cache\.safetensors cannot be read"):
        open_decoder(workspace, config)


def test_each_rank_has_the_parameters_of_its_heads(here: Path) -> None:
    """With a scale for each head they are the same numbers, whoever has them."""
    settings = {"device": "cpu", "dtype": "float32", "kv_dtype": "static", "cache_gb": 0.02, "max_batch_size": 4}
    asked = [request(i, [1 + i, 5, 9] * 20, max_new_tokens=8) for i in range(3)]
    answers = []
    for tp in (1, 2):
        assert lmtool(f"{QPARAMS} --granularity head --num_tp {tp}") == 0
        core = load_engine(here / "workspace", EngineConfig(**settings, tp=tp)).core  # type: ignore[arg-type]
        answers.append(run_all(core, asked))
        core.close()
    assert answers[0] == answers[1]
