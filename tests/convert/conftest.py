"""A tiny model, and the workspace that is made of it."""

from pathlib import Path

import pytest

from lmtool import cli
from tests.quant.models import tiny_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def workspace(model: Path) -> Path:
    assert cli.main(["convert", str(model), "--dst-path", str(model.parent / "workspace"), "--no-check"]) == 0
    return model.parent / "workspace"
