"""Where figures go: files that can be written, JSON, pictures. Knows not what is in them."""

from importlib.util import find_spec
from pathlib import Path

from lmtool.bench.picture import draw
from lmtool.bench.report import Report, to_json
from lmtool.errors import InputError


def check(json_file: str | None, png: Path | None) -> None:
    """Before minutes are spent: can the figures be written where they are wanted?"""
    for path in (Path(json_file) if json_file not in (None, "-") else None, png):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(
                f"{path} cannot be written: there is no folder {path.absolute().parent}", "create it first"
            )
        if path is not None and path.is_dir():
            raise InputError(f"{path} is a folder", "give the name of a file")
    if png is not None and find_spec("matplotlib") is None:
        raise InputError("--png needs matplotlib, which is not installed", "pip install 'lmtool[bench]'")


def write(report: Report, json_file: str | None, png: Path | None) -> None:
    if json_file is not None:
        put(to_json(report), json_file)
    if png is not None:
        draw(report, png)


def put(text: str, json_file: str) -> None:
    if json_file == "-":
        print(text)  # noqa: T201
    else:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
