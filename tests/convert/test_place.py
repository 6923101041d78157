"""Where a new folder or file is put: who else writes there, and what an error of the file system means."""

import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lmtool.convert.place import new_file, new_folder, temporary_folder
from lmtool.errors import CheckpointError, ConfigError, InputError


def fill(folder: Path, text: str) -> None:
    (folder / "lmtool.json").write_text(text)


def test_what_another_process_has_just_made_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not there when this one looked, and is there once the lock is free."""
    place, flock = tmp_path / "w", fcntl.flock

    def after_the_other(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        place.mkdir()
        fill(place, "the other's")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_the_other)
    with pytest.raises(ConfigError, match="is there already"), new_folder(place, overwrite=False) as folder:
        fill(folder, "mine")
    assert (place / "lmtool.json").read_text() == "the other's"


def test_a_lock_on_a_folder_that_was_renamed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened while the other filled it, locked when it had become the other's destination."""
    place, flock = tmp_path / "w", fcntl.flock

    def after_the_other(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".w.partial").rename(place)
        fill(place, "the other's")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_the_other)
    with pytest.raises(ConfigError, match="another process is writing"), new_folder(place, overwrite=True) as folder:
        fill(folder, "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert (place / "lmtool.json").read_text() == "the other's"


def test_the_next_one_s_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rename and the end of the block another process may have begun under the same name."""
    place, rename = tmp_path / "w", Path.rename

    def and_the_next_begins(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        path.mkdir()
        fill(path, "the next one's")
        return moved

    monkeypatch.setattr(Path, "rename", and_the_next_begins)
    with new_folder(place, overwrite=False) as folder:
        fill(folder, "mine")
    assert (place / "lmtool.json").read_text() == "mine"
    assert (tmp_path / ".w.partial/lmtool.json").read_text() == "the next one's"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda place: new_folder(place, overwrite=True), "partial"),
        (lambda place: new_file(place, overwrite=True), "partial"),
        (lambda place: temporary_folder(place, "unpickled"), "unpickled"),
    ],
)
def test_one_writer_at_a_time(make: Callable[[Path], AbstractContextManager[Path]], what: str, tmp_path: Path) -> None:
    place = tmp_path / "w.gguf"
    other = tmp_path / f".w.gguf.{what}"
    other.mkdir()
    (other / "half").write_text("x")
    descriptor = os.open(other, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is writing"), make(place):
        pass
    assert (other / "half").read_text() == "x"
    os.close(descriptor)


def test_whose_an_error_is(tmp_path: Path) -> None:
    gone = tmp_path / "model" / "tokenizer.json"
    unreadable = pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read: no such file")
    with unreadable, new_folder(tmp_path / "w", overwrite=False):
        gone.read_text()
    unwritable = pytest.raises(InputError, match=r"w cannot be written: no such file")
    with unwritable, new_folder(tmp_path / "w", overwrite=False) as folder:
        (folder / "no" / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []
