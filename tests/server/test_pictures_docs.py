"""docs/pictures.md: its Python runs, its curl line is answered, and its table is true."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lmtool.images.llava import LlavaForm
from lmtool.images.llava_config import CLIP_MEAN, CLIP_STD, NEXT_PINPOINTS
from lmtool.images.load import FORMATS, MOST_BYTES, MOST_PIXELS
from lmtool.server.config import ServerConfig
from tests.server.pictures import picture
from tests.server.serving import Serving
from tests.server.support import llava_engine
from tests.tiny_llava import tiny_llava

PAGE = (Path(__file__).parents[2] / "docs" / "pictures.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE, flags=re.DOTALL)
FIRST, OWN_PAGE, OPENAI = [block for kind, block in BLOCKS if kind == "python"]
(CURL,) = [block for kind, block in BLOCKS if "curl" in block]
ADDRESS = "localhost:23333"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs")
    tiny_llava(path / "MODEL")
    (path / "cat.jpg").write_bytes(picture(60, 40, form="JPEG"))
    (path / "later.jpg").write_bytes(picture(60, 40, seed=1, form="JPEG"))
    return path


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    engine = llava_engine(folder / "MODEL")
    with Serving(engine) as serving:
        yield serving
    engine.close()


def here(code: str) -> str:
    """With the model that there is."""
    config = 'EngineConfig(device="cpu", dtype="float32", session_len=512, cache_gb=0.05)'
    code = code.replace('pipeline("MODEL")', f'pipeline("./MODEL", {config})')
    return "from lmtool import EngineConfig\n" + code


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "docs"}
    exec(here(code), names)
    return names


def test_the_first_lines_answer_twice(capsys: pytest.CaptureFixture[str]) -> None:
    run(FIRST)["pipe"].close()
    assert len(capsys.readouterr().out.strip()) > 20


CALLED = """
from PIL import Image
image = Image.open("cat.jpg")
asked, said = answer(image, "What is this?")
assert asked == {"role": "user", "content": "What is this?"}
assert said["content"] == pipe(("What is this?", image)).text
assert answer(None, "x")[1]["content"] == "Put a picture there first."
shown = demo.output_components[0].postprocess([asked, said])  # it is what a Chatbot shows
assert [message.role for message in shown.root] == ["user", "assistant"]
pipe.close()
print("all of it")
"""


def test_a_page_of_ones_own() -> None:
    """In a process of its own: gradio leaves an event loop behind."""
    pytest.importorskip("gradio")
    code = here(OWN_PAGE).replace("__main__", "not now") + CALLED
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment)
    assert done.stdout.endswith("all of it\n"), done.stderr


def test_openais_client(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    run(OPENAI.replace(f"http://{ADDRESS}", server.url))
    assert capsys.readouterr().out.strip()


def test_the_line_for_a_shell(server: Serving) -> None:
    command = CURL.replace(ADDRESS, server.url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert '"chat.completion"' in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("fit", "said", "size"),
    [
        ("crop", "LLaVA 1.5, 336 pixels", (640, 480)),
        ("anyres", "336 × 336", (336, 336)),
        ("anyres", "640 × 480", (640, 480)),
        ("anyres", "672 × 672", (672, 672)),
        ("anyres", "1920 × 1080", (1920, 1080)),
    ],
)
def test_the_table_of_costs(fit: Any, said: str, size: tuple[int, int]) -> None:
    pinpoints = NEXT_PINPOINTS if fit == "anyres" else ()
    form = LlavaForm(
        fit=fit,
        tile_size=336,
        patch_size=14,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        pinpoints=pinpoints,
        keeps_class_token=False,
    )
    rows = form.prepare(Image.new("RGB", size)).num_tokens
    assert re.search(rf"{said} \| {rows:,} \|", PAGE)


def test_bounds_are_those_of_the_code() -> None:
    text = " ".join(PAGE.split())
    assert f"at most {MOST_BYTES // 10**6} MB and {MOST_PIXELS // 10**6} megapixels" in text
    assert f"takes {ServerConfig().max_images} pictures in a request" in text
    assert all(form.lower() in text.lower() for form in FORMATS)
