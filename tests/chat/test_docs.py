"""docs/chat.md names every command and every field."""

from pathlib import Path

from lmtool.chat.commands import COMMANDS
from lmtool.chat.oneshot import print_json
from tests.chat.fake_chat import FakeBackend

DOCS = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")


def test_every_slash_command_is_described() -> None:
    assert [name for name in COMMANDS if f"`/{name}" not in DOCS] == []


def test_every_field_of_the_json_is_described(capsys: object) -> None:
    import json

    from lmtool.config import GenerationConfig

    print_json(FakeBackend(100), [{"role": "user", "content": "poem"}], GenerationConfig(), model="m", load_s=0.0)
    fields = json.loads(capsys.readouterr().out)  # type: ignore[attr-defined]
    assert [name for name in fields if f"`{name}`" not in DOCS] == []
