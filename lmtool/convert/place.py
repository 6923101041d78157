"""A folder that is complete or not there: filled under another name beside its place, then put there at once.

Killed at any moment, the place holds what it held before, or all of the new.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmtool.checkpoint.formats import MANIFEST
from lmtool.errors import ConfigError, InputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def new_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill; it is ``destination`` once the block ends without an error, and gone if not.

    Raises ConfigError for a destination that must not be replaced, InputError for one that cannot be written.
    """
    check_destination(destination, overwrite=overwrite)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with _locked_folder(partial, destination):
            try:
                yield partial
                _put(partial, destination)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # after an exchange this is the old one
    except OSError as error:
        raise unwritable(destination, error) from error


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Raises ConfigError, which says whether --overwrite would help."""
    if not destination.name:
        raise ConfigError(f"--dst-path {destination} is no folder that can be made", "name one")
    if destination.is_symlink():
        raise ConfigError(f"--dst-path {destination} is a link", "give the folder itself")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ConfigError(f"--dst-path {destination} is a file", "give a folder")
    files = {file.name for file in destination.iterdir()}
    if not files & {MANIFEST, "config.json"} and files:
        raise ConfigError(f"--dst-path {destination} holds files that are no model", "give another folder")
    if files and not overwrite:
        raise ConfigError(f"--dst-path {destination} is there already", "give another folder, or --overwrite")


def unwritable(destination: Path, error: OSError) -> InputError:
    """What an error of the file system means to who gave the destination."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"the disk of {destination} is full", "make room, or give another --dst-path")
    what = error.strerror or str(error)
    return InputError(f"{destination} cannot be written: {what.lower()}", "give another --dst-path")


@contextmanager
def _locked_folder(folder: Path, destination: Path) -> Iterator[None]:
    """An empty folder that no other process fills; what a killed one left in it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {destination}", "wait for it, or end it") from None
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        os.close(descriptor)


def _put(partial: Path, destination: Path) -> None:
    for folder in (partial, destination.parent):
        _sync(folder)
    if not destination.exists():
        partial.rename(destination)
    elif not _exchange(partial, destination):
        # a file system that cannot exchange two names: for a moment there is neither
        old = partial.with_name(f".{destination.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
        partial.rename(destination)
        shutil.rmtree(old)
    _sync(destination.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Two names change their folders at once (Linux's renameat2, which Python does not offer)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(other))
