"""Pictures in a chat with a tiny LLaVA: in this process, over HTTP, and as the commands that users type."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from lmtool import GenerationConfig, cli, pipeline
from lmtool.chat.backend import Backend, LocalBackend
from lmtool.chat.http_backend import HttpBackend, InteractiveBackend
from lmtool.chat.pictures import Picture
from lmtool.chat.session import Session, Turn
from lmtool.config import EngineConfig
from lmtool.errors import InputError
from tests.chat.terminal import Terminal
from tests.server.pictures import picture
from tests.server.serving import Serving
from tests.server.support import llava_engine
from tests.tiny_llava import tiny_llava

GREEDY = GenerationConfig(temperature=0, max_new_tokens=8)
CAT = Picture.of("cat.png", picture(60, 40, seed=1))
DOG = Picture.of("dog.jpg", picture(100, 40, seed=2, form="JPEG"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    tiny_llava(path)
    return path


@pytest.fixture(scope="module")
def cat(folder: Path) -> Path:
    path = folder.parent / "my cat.png"
    path.write_bytes(picture(60, 40, seed=1))
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[LocalBackend]:
    backend = LocalBackend(
        pipeline(str(folder), EngineConfig(device="cpu", dtype="float32", session_len=1024, cache_gb=0.05))
    )
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Serving]:
    engine = llava_engine(folder)
    with Serving(engine) as serving:
        yield serving
    engine.close()


def said(backend: Backend, session: Session, question: str, *pictures: Picture) -> tuple[str, int]:
    """The answer, and the tokens of its prompt."""
    text, last = "", None
    for last in backend.stream(session.messages(question, pictures), GREEDY):
        text += last.text
    assert last is not None
    return text, last.num_prompt_tokens


# ---------------------------------------------------------------------- a picture
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_file_is_sent_as_it_is(form: str) -> None:
    data = picture(30, 20, form=form)
    found = Picture.of(f"a.{form}", data)
    assert found.url.startswith(f"data:image/{form.lower()};base64,")
    assert (found.width, found.height) == (30, 20)
    from lmtool.images.load import data_url_bytes

    assert data_url_bytes(found.url) == data
    assert f"a.{form}, 30 × 20" in str(found)


def test_a_format_that_few_servers_read_becomes_a_png() -> None:
    image = Image.frombytes("RGB", (2, 1), b"\0\1\2\3\4\5")
    out = io.BytesIO()
    image.save(out, "BMP")
    found = Picture.of("a.bmp", out.getvalue())
    assert found.url.startswith("data:image/png;base64,")
    from lmtool.images.load import load_image

    assert load_image(found.url).tobytes() == image.tobytes()


def test_a_path_with_a_tilde_and_one_that_is_not_there(cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(cat.parent))
    assert Picture.read("~/my cat.png") == Picture.of("my cat.png", cat.read_bytes())
    with pytest.raises(InputError, match=r"nothing\.png cannot be read: No such file"):
        Picture.read("nothing.png")
    with pytest.raises(InputError, match="is not at a public address"):
        Picture.read("http://127.0.0.1:1/cat.png")


# ---------------------------------------------------------------------- a backend
def test_here_and_over_http_are_one(local: LocalBackend, server: Serving) -> None:
    begun = said(local, Session(), "What is this?", CAT)
    session = Session("Be brief.", [Turn("What is this?", begun[0], pictures=(CAT,))])
    for other in (HttpBackend(server.url), InteractiveBackend(server.url, 3)):
        assert said(other, Session(), "What is this?", CAT) == begun
        assert said(other, session, "And this?", DOG, CAT) == said(local, session, "And this?", DOG, CAT)
        assert other.takes_pictures is local.takes_pictures is True
        other.close()


def test_counts_have_the_pictures_rows(local: LocalBackend, server: Serving) -> None:
    remote = HttpBackend(server.url)
    messages = Session("Be brief.").messages("What is this?", (CAT, DOG))
    assert local.count_tokens(messages) == remote.count_tokens(messages)
    assert local.count_tokens(messages) == said(local, Session("Be brief."), "What is this?", CAT, DOG)[1]
    assert local.render(messages).count("<image>") == 2
    assert "<image>" in remote.render(messages)
    assert "What is this?" in remote.render(messages)
    assert not local.opens_thought(messages)
    remote.close()


# ---------------------------------------------------------------------- commands
@pytest.fixture
def lmtool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: its exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        return cli.main(list(words)), *capsys.readouterr()

    return run


HERE = ("--device", "cpu", "--dtype", "float32", "--session-len", "1024", "--cache-gb", "0.05")
ASKED = ("--prompt", "What is this?", "--temperature", "0", "--max-new-tokens", "8")


def test_one_answer_about_pictures(
    folder: Path, cat: Path, server: Serving, local: LocalBackend, lmtool: Callable[..., tuple[int, str, str]]
) -> None:
    expected = said(local, Session(), "What is this?", CAT, CAT)
    images = ("--image", str(cat), "--image", str(cat))
    here = lmtool("chat", str(folder), *HERE, *ASKED, *images, "--json")
    there = lmtool("serve", "api_client", server.url, *ASKED, *images, "--json")
    for code, out, err in (here, there):
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["text"], found["num_prompt_tokens"]) == expected
    code, out, err = lmtool("chat", str(folder), *ASKED, *images, "--show-prompt")
    assert code == 0
    assert out.count("<image>") == 2
    assert f"lmtool: {expected[1]:,} tokens" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chat", "no-such-model", "--prompt", "x", "--image", "nothing.png"), "nothing.png cannot be read"),
        (("chat", "smollm2-135m", "--prompt", "x", "--image", "CAT"), "--image: this model takes no pictures"),
        (("serve", "api_client", "http://127.0.0.1:1", "--prompt", "x", "--image", __file__), "is no picture"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: tuple[str, ...], message: str, cat: Path, lmtool: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = lmtool(*(str(cat) if word == "CAT" else word for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_chat_begins_with_a_picture(server: Serving, cat: Path, tmp_path: Path) -> None:
    flags = ("--image", str(cat), "--no-history", "--max-new-tokens", "4")
    terminal = Terminal("-m", "lmtool", "serve", "api_client", server.url, *flags)
    terminal.wait("1 picture for your next message")
    terminal.ask("/set temperature 0", r"temperature +0\.0")
    terminal.ask("what is this", r"stopped at max_new_tokens")
    terminal.ask(f"/save {tmp_path}/a.json", "saved 1 turn with 1 picture")
    assert Session.load(tmp_path / "a.json").turns[0].pictures == (Picture.of("my cat.png", cat.read_bytes()),)
    terminal.close()
