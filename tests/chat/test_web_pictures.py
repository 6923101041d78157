"""Pictures on the page: a headless Chromium puts them there, and a tiny LLaVA answers. No other file gets out or in."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from lmtool.chat.pictures import Picture
from lmtool.chat.session import Session, Turn
from lmtool.chat.web_book import shown
from tests.chat.browser import Web, ask, in_a_browser, page_of, wait_for, wait_for_status, web
from tests.chat.terminal import REPO
from tests.server.pictures import picture
from tests.server.serving import Serving
from tests.server.support import llava_engine
from tests.tiny_llava import tiny_llava

FLAGS = ("--server-port", "0", "--max-new-tokens", "8", "--temperature", "0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava(folder)
    engine = llava_engine(folder)
    with Serving(engine) as serving:
        yield serving
    engine.close()


@pytest.fixture(scope="module")
def seeing(server: Serving) -> Iterator[Web]:
    with web("-m", "lmtool", "serve", "gradio", server.url, *FLAGS) as served:
        yield served


def upload(page: Any, *files: dict[str, Any]) -> None:
    page.locator("#question input[type=file]").set_input_files(list(files))
    page.wait_for_function(
        "number => document.querySelectorAll('#question .thumbnail-item, #question .thumbnail-image').length >= number",
        arg=len(files),
    )


def png(name: str, seed: int) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": picture(60, 40, seed)}


def prompt_tokens(status: str) -> int:
    return int(re.search(r"([\d,]+) prompt tokens", status)[1].replace(",", ""))


def test_names_of_pictures_are_no_markdown() -> None:
    cat = Picture.of("a](http://x)![b.png", picture())
    (message,) = shown(Session(), "what?", (cat,))
    assert message["content"].startswith("![a__http___x___b.png](data:image/jpeg;base64,")
    assert message["content"].endswith(")\n\nwhat?")
    session = Session(turns=[Turn("what?", "a cat", pictures=(cat, cat))])
    assert shown(session)[0]["content"].count("data:image/jpeg") == 2


@in_a_browser
def test_a_person_shows_pictures_in_a_browser(server: Serving, browser: Any, seeing: Web) -> None:
    with page_of(browser, seeing.url) as page:
        ask(page, "What is this?")
        blind = prompt_tokens(wait_for_status(page, "generated"))
        page.locator("#new").click()
        wait_for(page, "#conversations", "2: new conversation")
        upload(page, png("cat.png", 1), png("dog.png", 2))
        ask(page, "What is this?")
        page.wait_for_function("document.querySelectorAll('#chat img[alt$=png]').length == 2")
        wait_for(page, "#conversations", "2: What is this?")
        seen = prompt_tokens(wait_for_status(page, "generated"))
        rows = _rows(server, 1) + _rows(server, 2)
        assert seen == blind + rows + len("\n\n")  # one behind each picture in the template
        width = "Math.min(...[...document.querySelectorAll('#chat img[alt$=png]')].map(image => image.naturalWidth))"
        page.wait_for_function(f"{width} == 60")
        assert page.locator("#question .thumbnail-item").count() == 0  # they were sent
        # they stay with their conversation
        ask(page, "And now?")
        page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length >= 2")
        assert prompt_tokens(wait_for_status(page, "generated")) > seen
        page.locator("#conversations label").filter(has_text="1: What is this?").click()
        page.wait_for_function("document.querySelectorAll('#chat img[alt$=png]').length == 0")
        page.locator("#conversations label").filter(has_text="2: What is this?").click()
        page.wait_for_function("document.querySelectorAll('#chat img[alt$=png]').length == 2")


@in_a_browser
def test_what_is_no_picture_is_said_and_can_be_taken_out(server: Serving, browser: Any, seeing: Web) -> None:
    with page_of(browser, seeing.url) as page:
        upload(page, {"name": "cat.png", "mimeType": "image/png", "buffer": b"no picture at all"})
        ask(page, "What is this?")
        wait_for_status(page, "error: cat.png is no picture")
        assert page.locator("#question textarea").input_value() == "What is this?"
        assert server.context.engine.num_open == 0


@in_a_browser
def test_the_page_of_a_server_whose_model_sees_nothing(browser: Any) -> None:
    """It has no field for pictures, and takes none."""
    flags = ("-m", "lmtool", "serve", "gradio")
    with Serving() as blind, web(*flags, blind.url, *FLAGS) as served, page_of(browser, served.url) as page:
        wait_for(page, "body", "tiny · http")
        ask(page, "hello")
        assert "8 generated" in wait_for_status(page, "generated")
        ask(page, "again")
        page.wait_for_function("document.querySelectorAll('#chat .bot, #chat [data-testid=bot]').length >= 2")
        assert page.locator("#question input[type=file]").count() == 0
        with httpx.Client(base_url=served.url) as http:
            files = {"files": ("cat.png", picture(90, 90) + b"\0" * 2048)}
            assert http.post("/gradio_api/upload", files=files).status_code == 413


@in_a_browser
def test_no_other_file_of_the_machine_is_read(server: Serving, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    with web("-m", "lmtool", "serve", "gradio", server.url, *FLAGS) as served:
        with httpx.Client(base_url=served.url) as http:
            for path in ("/etc/passwd", f"{tmp_path}/secret.png", f"{REPO}/pyproject.toml", "pyproject.toml"):
                assert http.get(f"/gradio_api/file={path}").status_code in (403, 404), path
            files = {"files": ("cat.png", picture(60, 40))}
            (uploaded,) = http.post("/gradio_api/upload", files=files).json()
        folder = Path(uploaded).parents[1]
        assert (folder.name.startswith("lmtool-"), folder.stat().st_mode & 0o077) == (True, 0)  # nobody else's
        meta = {"meta": {"_type": "gradio.FileData"}}
        assert "8 generated" in _sent(served, {"text": "What is this?", "files": [{"path": uploaded, **meta}]})
        for path in (f"{tmp_path}/secret.png", "/etc/passwd", "../secret.png"):
            for more in (meta, {}):
                said = _sent(served, {"text": "What is this?", "files": [{"path": path, **more}]})
                assert "generated" not in said, said
                assert "process_completed" in said
    assert not folder.exists()


def _sent(served: Web, question: dict[str, Any]) -> str:
    """What the page's own function answers when it is called with this as what was typed."""
    with httpx.Client(base_url=served.url, timeout=120) as http:
        config = http.get("/config").json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        found = next(one for one in config["dependencies"] if names.get((one["inputs"] or [None])[0]) == "question")
        data = [question, None, "", 0.0, 1.0, 8]
        somebody = uuid4().hex  # new each time: gradio forgets whoever has gone, a moment later
        body = {"data": data, "fn_index": found["id"], "session_hash": somebody}
        assert http.post("/gradio_api/queue/join", json=body).status_code == 200
        lines = []
        with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": somebody}) as response:
            for line in response.iter_lines():
                lines.append(line)
                if line.startswith("data:") and json.loads(line[5:]).get("msg") == "process_completed":
                    break
        return "\n".join(lines)


def _rows(server: Serving, seed: int) -> int:
    from lmtool.images.load import decode_image

    return server.context.image_form.prepare(decode_image(picture(60, 40, seed))).num_tokens
