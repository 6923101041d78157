"""A folder or a file that is complete or not there: made under another name beside its place, then put there at once.

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

from lmtool.checkpoint.manifest import MANIFEST, PICKLE_SUFFIXES
from lmtool.errors import CheckpointError, ConfigError, InputError

_WEIGHTS = (".safetensors", *PICKLE_SUFFIXES)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def new_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill; it is ``destination`` once the block ends without an error, and gone if not.

    Raises ConfigError for a destination that must not be replaced, InputError for one that cannot be written.
    """
    check_destination(destination, overwrite=overwrite)
    with _refused_writes(destination), _locked_folder(destination, "partial") as partial:
        check_destination(destination, overwrite=overwrite)  # another process may have made it just now
        try:
            yield partial
            _put(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def temporary_folder(destination: Path, what: str) -> Iterator[Path]:
    """An empty folder beside ``destination`` for as long as the block lasts, one at a time of each name ``what``.

    Raises ConfigError where another process has it, InputError where it cannot be written.
    """
    with _refused_writes(destination), _locked_folder(destination, what) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """The name of a file to write; it is ``destination`` once the block ends without an error, and gone if not.

    Raises as `new_folder` does.
    """
    check_file(destination, overwrite=overwrite)
    with temporary_folder(destination, "partial") as folder:
        check_file(destination, overwrite=overwrite)
        yield folder / destination.name
        (folder / destination.name).replace(destination)
        _sync(destination.parent)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Raises ConfigError, which says whether --overwrite would help."""
    if destination.name in ("", ".."):
        raise ConfigError(f"--dst-path {destination} is no folder that can be made", "name one")
    if os.path.islink(destination):
        raise ConfigError(f"--dst-path {destination} is a link", "give the folder itself")
    if not os.path.exists(destination):
        return
    if not destination.is_dir():
        raise ConfigError(f"--dst-path {destination} is a file", "give a folder")
    files = {file.name for file in destination.iterdir()}
    # --overwrite removes all that is there: a config.json alone may be of any program
    is_model = "config.json" in files and any(name.endswith(_WEIGHTS) for name in files)
    if files and MANIFEST not in files and not is_model:
        raise ConfigError(f"--dst-path {destination} holds files that are no model", "give another folder")
    if files and not overwrite:
        raise ConfigError(f"--dst-path {destination} is there already", "give another folder, or --overwrite")


def check_file(destination: Path, *, overwrite: bool) -> None:
    """Raises ConfigError for a GGUF file's name that will not do."""
    if destination.suffix != ".gguf":
        raise ConfigError(f"--dst-path {destination} is no GGUF file's name", "let it end in .gguf")
    if destination.is_dir() or os.path.islink(destination):
        raise ConfigError(f"--dst-path {destination} is no file", "give the name of one")
    if os.path.exists(destination) and not overwrite:
        raise ConfigError(f"--dst-path {destination} is there already", "give another name, or --overwrite")


def refuse_nesting(source: Path, destination: Path, name: str) -> None:
    """Raises ConfigError where one of them lies in the other: what is read would be replaced, or grow while it is read.

    name: what the user called the source.
    """
    inner, outer = source.resolve(), destination.parent.resolve() / destination.name
    if destination.name == "..":
        outer = destination.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ConfigError(f"--dst-path {destination} and {name} lie in one another", "give a folder beside the model")


@contextmanager
def _refused_writes(destination: Path) -> Iterator[None]:
    """The file system's errors as InputError; one that names a file which is not written here is the source's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {destination} is full", "make room, or give another --dst-path") from error
        what = (error.strerror or str(error)).lower()
        if isinstance(error.filename, str) and not _is_written(Path(error.filename).absolute(), destination.absolute()):
            raise CheckpointError(f"{error.filename} cannot be read: {what}", "is all of the model there?") from error
        raise InputError(f"{destination} cannot be written: {what}", "give another --dst-path") from error


def _is_written(path: Path, destination: Path) -> bool:
    made = next((part for part in (path, *path.parents) if part.parent == destination.parent), None)
    return path in destination.parents or (made is not None and made.name.lstrip(".").startswith(destination.name))


@contextmanager
def _locked_folder(destination: Path, what: str) -> Iterator[Path]:
    """An empty folder beside ``destination`` that no other process fills; what a killed one left in it is removed."""
    folder = destination.with_name(f".{destination.name}.{what}")
    if folder.parent.is_file():
        raise ConfigError(f"--dst-path {destination} lies in a file", "give a place in a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    with _lock(folder, destination):
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield folder


@contextmanager
def _lock(folder: Path, destination: Path) -> Iterator[None]:
    """The lock is the folder's and goes with it to another name: who had to wait for it may hold what is no more it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_it = os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            is_it = False
        if not is_it:
            raise ConfigError(f"another process is writing {destination}", "wait for it, or end it")
        yield
    finally:
        os.close(descriptor)


def _put(partial: Path, destination: Path) -> None:
    for folder in (partial, destination.parent):
        _sync(folder)
    if not destination.exists():
        partial.rename(destination)
    else:
        with _lock(destination, destination):  # it gets the name that others fill: none may until it is gone
            if not _exchange(partial, destination):
                # a file system that cannot exchange two names: for a moment there is neither
                old = partial.with_name(f".{destination.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                destination.rename(old)
                partial.rename(destination)
                partial = old
            shutil.rmtree(partial, ignore_errors=True)
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
