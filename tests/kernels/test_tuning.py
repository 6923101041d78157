"""Tuned launch configurations: files that are read or refused, whose entries go first, and the rules for the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtool.bench.shapes import SHAPES, Product, all_products, part_of
from lmtool.errors import ConfigError
from lmtool.kernels.triton import tables, tuning
from lmtool.kernels.triton.tables import Entry, Key, Table
from lmtool.kernels.triton.tuning import LibraryConfig, RowConfig, TileConfig

HOPPER = 90
KEY = Key("tiles", 6144, 4096, False, 2)
SHAPE = {"paired": False, "itemsize": 2}
ENTRIES = [
    Entry(KEY, 16, TileConfig(64, 256, 4, 3, split=2), 12.5),
    Entry(KEY, 32, TileConfig(128, 64, 8, 5)),
    Entry(Key("rows", 6144, 4096, False, 2), 1, RowConfig(4, 4096, 8)),
    Entry(Key("library", 6144, 4096, False, 2), None, LibraryConfig(64)),
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache folder of its own, and tables that are read anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning._stored.cache_clear()
    yield
    tuning._stored.cache_clear()


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sm_90.json"
    tables.write(path, HOPPER, ENTRIES, {"device": "H200"})
    assert set(tables.read(path, HOPPER, tuning.CONFIGS)) == set(ENTRIES)
    assert json.loads(path.read_text())["made_with"] == {"device": "H200"}
    assert path.read_text().count("\n") == 9 + len(ENTRIES), "one line an entry"
    assert list(path.parent.iterdir()) == [path], "nothing unfinished is left"


def test_a_table_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sm_90.json"
    tables.write(path, HOPPER, ENTRIES, {})
    before = path.read_text()

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        tables.write(path, HOPPER, ENTRIES[:1], {})
    assert path.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == ["sm_90.json"]


def test_the_smallest_bucket_that_holds_the_rows() -> None:
    table = Table(ENTRIES)
    assert [table.find(KEY, rows) for rows in (2, 16, 17, 32, 33)] == [
        *[ENTRIES[0].config] * 2,
        *[ENTRIES[1].config] * 2,
        None,
    ]
    assert table.find(KEY._replace(paired=True), 2) is None
    assert table.find(KEY._replace(itemsize=4), 2) is None
    assert table.find(ENTRIES[3].key, 10_000) == LibraryConfig(64)


def test_the_users_entries_go_before_the_packages_one_by_one() -> None:
    packaged = tables.read(tables.packaged_path(HOPPER), HOPPER, tuning.CONFIGS)
    mine, other = (entry for entry in packaged if entry.key.kernel == "rows" and entry.key[1:3] in SIZES)
    tables.write(tables.user_path(HOPPER), HOPPER, [mine._replace(config=RowConfig(1, 64, 1))], {})
    found = [tuning.row_config(HOPPER, *one.key[1:3], paired=False, itemsize=2) for one in (mine, other)]
    assert found == [RowConfig(1, 64, 1), other.config]


SIZES = ((4096, 4096), (2048, 2048))


def test_what_is_tried_out_goes_before_all_and_only_inside() -> None:
    stored = tuning.row_config(HOPPER, 4096, 4096, **SHAPE)
    with tuning.using([Entry(Key("rows", 4096, 4096, False, 2), 1, RowConfig(1, 64, 1))]):
        assert tuning.row_config(HOPPER, 4096, 4096, **SHAPE) == RowConfig(1, 64, 1)
        assert tuning.max_rows(HOPPER, 4096, 4096, **SHAPE) == 32
    assert tuning.row_config(HOPPER, 4096, 4096, **SHAPE) == stored


def test_the_packaged_table_holds_every_bucket_of_the_published_shapes() -> None:
    models = [SHAPES[name] for name in ("llama3-8b", "internlm2-1_8b", "llama2-7b", "qwen2.5-0.5b")]
    table = Table(tables.read(tables.packaged_path(HOPPER), HOPPER, tuning.CONFIGS))
    for product in all_products(models):
        matrix = (product.num_out, product.num_in, product.paired, 2)
        assert table.find(Key("rows", *matrix)) is not None, product
        assert 16 <= table.find(Key("library", *matrix)).above <= 64, product
        for rows in (2, 16, 32, 64):
            assert table.find(Key("tiles", *matrix), rows) is not None, product


def test_other_cards_dtypes_and_shapes_follow_the_rule() -> None:
    assert not tables.packaged_path(80).exists()
    for capability, size, itemsize in ((80, (6144, 4096), 2), (HOPPER, (6144, 4096), 4), (HOPPER, (640, 448), 2)):
        shape = {"paired": False, "itemsize": itemsize}
        assert tuning.max_rows(capability, *size, **shape) == 32
        row = tuning.row_config(capability, *size, **shape)
        assert row.block_k <= 4096
        tile = tuning.tile_config(capability, 16, *size, **shape)
        assert tile.swap == (itemsize == 2)
    assert tuning.row_config(80, 640, 448, **SHAPE) == RowConfig(2, 512, 4)


def _entry(**changes: Any) -> dict[str, Any]:
    entry = {"kernel": "rows", "num_out": 8, "num_in": 8, "paired": False, "itemsize": 2, "rows": 1}
    return {**entry, "config": {"block_n": 2, "block_k": 64, "num_warps": 4}, **changes}


def _config(**changes: Any) -> dict[str, Any]:
    return _entry(config={**_entry()["config"], **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", 'must be an object with "format"'),
        ({"format": "lmtool-tuned/0"}, 'must be an object with "format"'),
        ({"capability": 80}, "it is for compute capability 80, not 90"),
        ({"entries": 3}, "it has no list of entries"),
        ({"entries": [3]}, "entry 1: is not an object"),
        ({"entries": [_entry(), {"kernel": "rows"}]}, "entry 2: lacks config, itemsize, num_in"),
        ({"entries": [_entry(speed=1)]}, "entry 1: has speed, which no entry has"),
        ({"entries": [_entry(kernel="w9")]}, "kernel 'w9' is not known; there are rows, tiles, library"),
        ({"entries": [_entry(paired=1)]}, "paired is 1, not true or false"),
        ({"entries": [_entry(num_out="8")]}, "num_out is '8', not a positive whole number"),
        ({"entries": [_entry(rows=0)]}, "rows is 0, not a positive whole number"),
        ({"entries": [_entry(config=[2, 64, 4])]}, "config is not an object"),
        ({"entries": [_entry(config={"block_n": 2})]}, "config lacks block_k, num_warps"),
        ({"entries": [_config(split=2)]}, "config has split, which a RowConfig has not"),
        ({"entries": [_config(block_n=3)]}, "block_n is 3, not a power of two"),
        ({"entries": [_config(num_warps=True)]}, "num_warps is True, not a positive whole number"),
    ],
)
def test_a_damaged_table_is_named_where_it_is_needed(content: Any, message: str) -> None:
    path = tables.user_path(HOPPER)
    path.parent.mkdir(parents=True)
    if isinstance(content, dict):
        content = json.dumps({"format": tables.FORMAT, "capability": HOPPER, "entries": [], **content})
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        tuning.max_rows(HOPPER, 8, 8, **SHAPE)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "delete it, or write it anew with `lmtool bench kernels --tune`" in str(caught.value)


def test_the_kernels_launch_what_the_table_says(device: torch.device) -> None:
    """Two rows and one row with entries that the rules would never give: the results are still right."""
    from lmtool.kernels.reference import linear as reference
    from lmtool.kernels.triton import linear
    from lmtool.kernels.triton.launch import arch

    x, weight = torch.randn(2, 96, device=device), torch.randn(40, 96, device=device)
    key = ("tiles", 40, 96, False, 4)
    odd = [
        Entry(Key(*key), 16, TileConfig(16, 32, 4, 2, swap=False, split=3)),
        Entry(Key("library", *key[1:]), None, LibraryConfig(1)),
    ]
    launched: list[Any] = []
    original = linear._launch_tiles

    def note(*arguments: Any) -> None:
        launched.append(tuning.tile_config(arch(device), 2, 40, 96, paired=False, itemsize=4))
        original(*arguments)

    expected = reference.linear(x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_launch_tiles", note)
        with tuning.using(odd[:1]):
            torch.testing.assert_close(linear.linear(x, weight), expected)
        with tuning.using(odd):  # more than one row: the library's
            torch.testing.assert_close(linear.linear(x, weight), expected)
    assert launched == [odd[0].config]


def _packaged() -> list[tuple[Product, int]]:
    """Each matrix and bucket of the table, with the op it is used in."""
    models = [*SHAPES.values(), part_of("llama3-8b", 2), part_of("llama3-8b", 4)]
    sizes = {(one.num_out, one.num_in, one.paired): one for one in all_products(models)}
    entries = tables.read(tables.packaged_path(HOPPER), HOPPER, tuning.CONFIGS)
    return [(sizes[e.key[1:4]], e.rows) for e in entries if e.key.kernel in ("rows", "tiles") and e.rows is not None]


@pytest.mark.gpu
@pytest.mark.parametrize(("product", "rows"), _packaged(), ids=str)
def test_every_packaged_configuration_is_right_every_time(product: Product, rows: int, device: torch.device) -> None:
    from lmtool.bench.trials import Case
    from lmtool.kernels.triton.launch import arch

    if arch(device) != HOPPER:
        pytest.skip("the table is Hopper's")
    assert Case(product, rows, torch.float16, device, num_copies=1).problem(repeats=30) is None
