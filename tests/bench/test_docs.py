"""docs/benchmarks.md names every mix, shape, option and field; its peer's file is one that we read."""

import re
from dataclasses import fields
from pathlib import Path

from lmtool import cli
from lmtool.bench.kernel_cases import GROUPS
from lmtool.bench.report import Report, read_report
from lmtool.bench.shapes import SHAPES
from lmtool.bench.workloads import MIXES
from lmtool.cluster.spec_reader import read_spec

FOLDER = Path(__file__).parents[2] / "docs"
DOCS = (FOLDER / "benchmarks.md").read_text(encoding="utf-8")


def test_every_name_is_described() -> None:
    names = [*MIXES, *SHAPES, *(field.name for field in fields(Report))]
    assert [name for name in names if f"`{name}`" not in DOCS] == []


def test_every_command_line_is_one_that_is_understood() -> None:
    """Each line of the first block: its command and every option of it are there."""
    commands = cli.build().commands["bench"].commands
    lines = re.findall(r"^lmtool bench (\S+)(.*)$", DOCS, re.MULTILINE)
    assert {name for name, _ in lines} == set(commands)
    for name, rest in lines:
        known = {flag for param in commands[name].params for flag in (*param.opts, *param.secondary_opts)}
        for flag in re.findall(r"--[a-z-]+", rest.split("#")[0]):
            assert flag in known, f"bench {name} {flag}"


def test_every_option_of_the_new_commands_is_described() -> None:
    described = set(re.findall(r"--[a-z-]+", DOCS)) | UNIVERSAL
    for name in ("kernels", "online", "kv", "curve", "plan"):
        for param in cli.build().commands["bench"].commands[name].params:
            flags = {flag for flag in (*param.opts, *param.secondary_opts) if flag.startswith("--")}
            assert not flags or flags & described, f"bench {name} {flags}"


UNIVERSAL = {"--device", "--dtype", "--seed", "--model", "--api-key", "--verbose"}


def test_groups_of_ops_are_described() -> None:
    assert [group for group in GROUPS if f"`{group}`" not in DOCS] == []


def test_the_peers_example_is_a_report(tmp_path: Path) -> None:
    example = re.search(r"```json\n(.*?)```", DOCS, re.DOTALL)
    assert example is not None
    path = tmp_path / "peer.json"
    path.write_text(example[1])
    assert read_report(path).metric("chat1000", "requests_per_s") == {"median": 54.6}


def test_the_models_of_the_scaling_page_are_what_a_proxy_takes(tmp_path: Path) -> None:
    tables = re.findall(r"```toml\n(.*?)```", (FOLDER / "scaling.md").read_text(encoding="utf-8"), re.DOTALL)
    path, bounds = tmp_path / "models.toml", []
    for table in tables:
        path.write_text(table)
        (model,) = read_spec(path).models
        bounds.append(model.bounds)
    assert bounds == [(4, 4), (2, 4)]
