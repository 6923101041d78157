"""`lmtool list`, run as a user runs it, with a hub cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = "import typer; from lmtool.commands.list_models import list_models; typer.run(list_models)"


def run(home: Path, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=os.environ | {"HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    ).stdout


def cache_model(home: Path, hub_id: str, *names: str) -> None:
    """As the hub's client lays a download out: blobs, and a snapshot of links to them."""
    repo = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    for name in names:
        blob = repo / "blobs" / name.replace(".", "")
        blob.write_bytes(bytes(1000))
        (snapshot / name).symlink_to(blob)


def test_an_empty_machine(tmp_path: Path) -> None:
    text = run(tmp_path)
    assert "smollm2-135m" in text
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in text
    assert "QWenLMHeadModel" in text
    assert text.endswith("Models in the hub's cache: none\n")


def test_the_hub_s_cache(tmp_path: Path) -> None:
    cache_model(tmp_path, "org/whole", "config.json", "model.safetensors")
    cache_model(tmp_path, "org/pickled", "config.json", "pytorch_model.bin")
    found = json.loads(run(tmp_path, "--json"))
    assert set(found) == {"short_names", "architectures", "hub_cache"}
    assert found["short_names"][0]["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["short_names"][0]["path"].endswith(".gguf")
    assert "InternLM2ForCausalLM" in found["architectures"]
    assert [(model["hub_id"], model["complete"], model["size_bytes"]) for model in found["hub_cache"]] == [
        ("org/pickled", False, 2000),
        ("org/whole", True, 2000),
    ]
    assert "org/pickled" in run(tmp_path)
    assert "not a whole model" in run(tmp_path)
