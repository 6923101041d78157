"""The conversation as data, and the files it is kept in."""

import json
from pathlib import Path

import pytest

from lmtool.chat.pictures import Picture
from lmtool.chat.session import FORMAT, Session, Turn
from lmtool.errors import InputError

SAID = {"user": "a", "assistant": "b"}
CAT = {"name": "cat.png", "url": "data:image/png;base64,AAAA", "width": 6, "height": 4}


def test_messages_of_a_conversation_and_a_new_question() -> None:
    session = Session("be brief", [Turn("a", "b")])
    assert session.messages("c") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]


def test_undo_takes_the_last_turn_and_refuses_when_there_is_none() -> None:
    session = Session(None, [Turn("a", "b"), Turn("c", "d")])
    assert session.undo() == Turn("c", "d")
    session.clear()
    with pytest.raises(InputError, match="no turn to take back"):
        session.undo()


def test_dropping_the_oldest_keeps_the_rest() -> None:
    session = Session(None, [Turn("a", "b"), Turn("c", "d"), Turn("e", "f")])
    session.drop_oldest(2)
    assert session.turns == [Turn("e", "f")]


def test_a_saved_chat_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    session = Session("système", [Turn("a\n\nb", "上海", partial=True), Turn("\x1b", "😀")])
    session.save(path, model="some model")
    assert Session.load(path) == session
    assert json.loads(path.read_text(encoding="utf-8"))["model"] == "some model"
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_pictures_are_saved_with_their_turns(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    cat = Picture("cat.png", "data:image/png;base64,AAAA", 60, 40)
    session = Session(None, [Turn("a", "b"), Turn("what?", "a cat", pictures=(cat, cat))])
    session.save(path)
    assert Session.load(path) == session
    assert json.loads(path.read_text())["version"] == 2
    part = {"type": "image_url", "image_url": {"url": cat.url}}
    text = {"type": "text", "text": "what?"}
    assert session.messages()[2] == {"role": "user", "content": [part, part, text]}
    asked = session.messages("and?", (cat,))[-1]
    assert asked == {"role": "user", "content": [part, {"type": "text", "text": "and?"}]}
    Session(None, session.turns[:1]).save(path)  # what has no pictures is readable to those who know none
    saved = json.loads(path.read_text())
    assert (saved["version"], set(saved["turns"][0])) == (1, {"user", "assistant", "partial"})


def test_save_replaces_a_saved_chat_but_nothing_else(tmp_path: Path) -> None:
    chat, other = tmp_path / "chat.json", tmp_path / "notes.txt"
    other.write_text("dear diary")
    Session(None, [Turn("a", "b")]).save(chat)
    Session(None, []).save(chat)
    assert Session.load(chat).turns == []
    with pytest.raises(InputError, match="not a saved chat"):
        Session().save(other)
    assert other.read_text() == "dear diary"


def test_save_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        Session().save(tmp_path / "nowhere" / "chat.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version is not 1 to 2"),
        ({"system": 3}, "system is neither text nor null"),
        ({"turns": {}}, "turns is not a list"),
        ({"turns": ["x"]}, r"turns\[0\] is not an object"),
        ({"turns": [{"user": "a"}]}, r"turns\[0\]\.assistant is missing or not text"),
        ({"turns": [{"user": "a", "assistant": "b", "partial": 1}]}, r"turns\[0\]\.partial is neither true nor"),
        ({"format": "other"}, "is not a saved chat"),
        ({"turns": [{**SAID, "pictures": {}}]}, r"turns\[0\]\.pictures is not a list"),
        ({"turns": [{**SAID, "pictures": [5]}]}, r"pictures\[0\] is not an object"),
        ({"turns": [{**SAID, "pictures": [{**CAT, "name": 1}]}]}, r"pictures\[0\]\.name is missing"),
        ({"turns": [{**SAID, "pictures": [{**CAT, "url": "http://x"}]}]}, r"\.url is no data URL of a picture"),
        ({"turns": [{**SAID, "pictures": [{**CAT, "height": 0}]}]}, r"\.height is missing or no number of pixels"),
    ],
)
def test_load_names_what_is_wrong(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"format": FORMAT, "version": 1, "system": None, "turns": [], **change}))
    with pytest.raises(InputError, match=message):
        Session.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]"])
def test_load_refuses_what_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a saved chat"):
        Session.load(path)


def test_load_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        Session.load(tmp_path / "nothing.json")
