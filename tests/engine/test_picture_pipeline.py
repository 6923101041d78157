"""Pictures through `pipeline`, as its users know it: what is wrong with one is one line, and touches nobody else."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmtool import EngineConfig, GenerationConfig, pipeline
from lmtool.engine.pipeline import Pipeline
from lmtool.errors import LmtoolError, RequestError
from lmtool.vl import load_image
from tests.hub_llava import hub_llava
from tests.models.test_llava import picture
from tests.tiny_llava import tiny_llava

GREEDY = GenerationConfig(temperature=0, max_new_tokens=8, ignore_eos=True)
SHOWN = picture((56, 56))
GOOD: list[Any] = [("describe this image", SHOWN), "how many foxes?", ("and these", [picture((100, 30), 3), SHOWN])]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava(folder)
    with pipeline(folder, EngineConfig(dtype="float32", device="cpu", cache_gb=0.05)) as made:
        yield made


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> list[list[int]]:
    return [pipe(prompt, GREEDY).token_ids for prompt in GOOD]


def file_of(image: Image.Image, form: str, **more: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **more)
    return written.getvalue()


def huge() -> bytes:
    """Of a kilobyte, and of 10¹⁰ pixels."""
    data = bytearray(file_of(Image.new("1", (8, 8)), "BMP"))
    data[18:26] = (100_000).to_bytes(4, "little") * 2
    return bytes(data)


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "cut off": (lambda: file_of(SHOWN, "PNG")[:900], "damaged or cut off"),
    "no picture": (lambda: b"no picture at all", "is no picture"),
    "empty": (lambda: b"", "is empty"),
    "huge": (huge, "has more than 50 megapixels|has 100000 x 100000 pixels"),
    "long file": (lambda: bytes(20_000_001), "20.0 MB"),
    "long side": (lambda: Image.new("1", (70_000, 1)), "70000 x 1 pixels"),
    "animated": (lambda: file_of(SHOWN, "GIF", save_all=True, append_images=[picture((56, 56), 1)]), "several frames"),
    "missing": (lambda: "nowhere.png", "nowhere.png cannot be read: No such file"),
    "folder": (lambda: Path("/"), "is no file"),
    "nothing": (lambda: "", "name is empty"),
    "this machine": (lambda: "http://localhost:1/a.png", "not at a public address"),
    "a cloud's metadata": (lambda: "http://169.254.169.254/latest", "not at a public address"),
    "another scheme": (lambda: "file:///etc/passwd", "not read from file: URLs"),
    "no scheme of pictures": (lambda: "data:text/html;base64,aaaa", "of another kind"),
    "array": (lambda: np.zeros((4, 4, 3)), "is a ndarray"),
    "none": (lambda: None, "is a NoneType"),
    "list in a list": (lambda: [SHOWN], "is a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_is_refused_and_nobody_else_is_touched(
    pipe: Pipeline, alone: list[list[int]], name: str
) -> None:
    """In the midst of other answers, and between good prompts of the same call."""
    make, said = BROKEN[name]
    others = pipe.stream_infer(GOOD, GREEDY)
    answers: list[list[int]] = [[] for _ in GOOD]
    first = next(others)
    answers[first.index] += first.token_ids
    with pytest.raises(RequestError, match=f"^prompt 1: .*{said}") as refused:
        pipe([GOOD[0], ("what is it?", [SHOWN, make()]), GOOD[1]], GREEDY)
    assert "\n" not in str(refused.value)
    assert refused.value.fix
    for part in others:
        answers[part.index] += part.token_ids
    assert answers == alone
    assert [answer.token_ids for answer in pipe(GOOD, GREEDY)] == alone


ODD: dict[str, Callable[[], Any]] = {
    "CMYK": lambda: file_of(SHOWN.convert("CMYK"), "JPEG"),
    "one pixel": lambda: file_of(Image.new("RGB", (1, 1), "red"), "PNG"),
    "a line": lambda: Image.new("RGB", (1, 60_000)),
    "black and white": lambda: SHOWN.convert("1"),
    "palette": lambda: file_of(SHOWN.convert("P"), "GIF"),
    "transparent": lambda: file_of(SHOWN.convert("RGBA"), "WEBP"),
    "16 bits": lambda: file_of(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_answered_as_its_colours_are(pipe: Pipeline, name: str) -> None:
    source = ODD[name]()
    answer = pipe(("what is it?", source), GREEDY)
    assert answer.num_generated_tokens == 8
    assert answer.token_ids == pipe(("what is it?", load_image(source).convert("RGB")), GREEDY).token_ids


WRONG: list[tuple[Any, str]] = [
    (("what", SHOWN, SHOWN), "a tuple of other things"),
    ((SHOWN, "what"), "a tuple of other things"),
    (SHOWN, "a prompt is a Image"),
    ({"role": "user", "content": "what"}, "a prompt is a dict"),
    ([{"role": "user", "content": None}], "message 0: content is None"),
    ([{"role": "user", "content": ["what"]}], "message 0: part 0 is a str"),
    ([{"role": "user", "content": [{"type": "image"}]}], "part 0 is of type 'image' with nothing"),
    ([{"role": "user", "content": [{"type": "video", "video": 1}]}], "part 0 is of type 'video'"),
    (("what", [SHOWN] * 200), "17600 of them of pictures"),
]


@pytest.mark.parametrize(("prompt", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_prompt_that_is_none(pipe: Pipeline, prompt: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pipe(prompt, GREEDY)


def test_every_way_to_give_pictures(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "shown.png"
    SHOWN.save(path)
    one = pipe(("what is it?", SHOWN), GREEDY).token_ids
    for source in (path, str(path), path.read_bytes(), load_image(path), [SHOWN], (SHOWN,)):
        assert pipe(("what is it?", source), GREEDY).token_ids == one
    parts = [{"type": "image", "image": SHOWN}, {"type": "text", "text": "what is it?"}]
    assert pipe([{"role": "user", "content": parts}], GREEDY).token_ids == one
    assert pipe(("what is it?", []), GREEDY).token_ids == pipe("what is it?", GREEDY).token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"response_format": {"type": "regex_schema", "regex_schema": "[ab]{3}"}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"logprobs": 3},
        {"bad_words": ["the fox"], "stop": ["zzz"], "logit_bias": {7: 3.0}, "min_new_tokens": 3},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_whatever_is_asked_of_an_answer_beside_a_picture_is_as_alone(pipe: Pipeline, settings: dict[str, Any]) -> None:
    given = GenerationConfig(**{"temperature": 0.0, "max_new_tokens": 8, **settings})
    together = pipe(GOOD, given)
    for prompt, answer in zip(GOOD, together, strict=True):
        one = pipe(prompt, given)
        assert (one.token_ids, one.text) == (answer.token_ids, answer.text)
        assert (answer.logprobs is not None) == ("logprobs" in settings)
    if "response_format" in settings:
        assert all(len(answer.text) == 3 and not set(answer.text) - {*"ab"} for answer in together)


# ------------------------------------------------------------------ conversations


def test_a_turn_computes_what_is_new_and_sees_each_picture_once(encoded: list[int], tmp_path: Path) -> None:
    """With llava-hf's tokenizer and template, and answers that are the same tokens when they come back in a message."""
    hub_llava("llava-hf/llava-1.5-7b-hf", tmp_path)
    letters = GenerationConfig(temperature=0, response_format={"type": "regex_schema", "regex_schema": " [QXZ]{6}"})
    file = tmp_path / "shown.png"
    picture((84, 28), 77).save(file)
    turns: list[Any] = [("what is it?", str(file)), "and now?", ("and this?", picture((28, 84), 78)), "both?"]
    with pipeline(tmp_path, EngineConfig(dtype="float32", device="cpu", cache_gb=0.2)) as pipe:
        session = pipe.session("be brief")
        known = 0
        for turn, num_seen in zip(turns, (1, 1, 2, 2), strict=True):
            session = pipe.chat(turn, session, letters)
            answer = session.response
            assert answer is not None
            assert len(answer.text) == 6
            assert answer.num_cached_tokens == known
            assert sum(encoded) == num_seen
            known = answer.num_prompt_tokens + len(" Z") + 5  # of its tokens the last, the end, has no K and V
            file.unlink(missing_ok=True)  # a picture is read once
    assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 4]


def test_a_turn_that_is_refused_leaves_the_conversation_as_it_was(pipe: Pipeline) -> None:
    session = pipe.chat(("what is it?", SHOWN), None, GREEDY)
    before, answer = list(session.messages), session.response
    wrong: list[tuple[Any, str]] = [
        (("and this?", "nowhere.png"), "cannot be read"),
        (["one", "two"], "a turn is a list of prompts"),
        ([], "a turn is a list of prompts"),
        (None, "a prompt is a NoneType"),
    ]
    for turn, said in wrong:
        with pytest.raises(LmtoolError, match=said):
            pipe.chat(turn, session, GREEDY)
        assert (session.messages, session.response) == (before, answer)
    assert pipe.chat("and?", session, GREEDY).messages[:2] == before
