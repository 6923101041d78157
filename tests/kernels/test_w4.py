"""4-bit weights: their tiles there and back, and Triton's products against plain torch's."""

import pytest
import torch
import triton
import triton.language as tl

from lmtool import kernels
from lmtool.errors import KernelError
from lmtool.kernels.reference import w4 as reference
from lmtool.kernels.triton import tables, tuning
from lmtool.kernels.triton import w4 as triton_w4
from lmtool.kernels.triton.precompile import Precompilation
from lmtool.kernels.triton.w4_wide_plan import piece_of, share_out
from tests.kernels.support import assert_close, normal

HALVES = [torch.float16, torch.bfloat16]
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# (rows, out features, in features, group): one row, a few, more; in features that fill no tile; rows of tiles cut short
SHAPES = [
    (1, 64, 256, 128),
    (1, 96, 256, 32),
    (3, 40, 192, 64),
    (16, 64, 256, 128),
    (1, 32, 288, 32),
    (9, 32, 288, 32),
    (33, 72, 320, 64),
    (20, 160, 256, 32),
]
# on a card: what an 8B and a 0.5B model have, each kernel and each of its groups
LARGE = [(rows, 6144, 4096, 128) for rows in (1, 8, 16, 64, 256, 1000)]
LARGE += [(rows, 4096, 14336, 64) for rows in (1, 16, 128)]
LARGE += [(rows, 896, 4864, 32) for rows in (1, 8, 64)]
CASES = [*SHAPES, *LARGE]
SHAPES += [pytest.param(*shape, marks=pytest.mark.gpu) for shape in LARGE]
EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def compiled_at_once(device):
    """On a card every variant on threads: a hundred, one after the other, would take minutes."""
    if device.type == "cuda":
        Precompilation(lambda: [rehearse(*shape, dtype) for shape in CASES for dtype in HALVES]).wait()


def rehearse(rows: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    meta = torch.device("meta")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    plain = kernels.empty_w4(n, k, group, meta)
    triton_w4.w4_linear(empty(rows, k), plain, empty(n))
    triton_w4.norm_w4_linear(empty(rows, k), empty(k), EPS, plain)
    paired = kernels.empty_w4(n // 32 * 32, k, group, meta, paired=True)
    triton_w4.norm_w4_linear_silu(empty(rows, k), empty(k), EPS, paired)
    triton_w4.add_w4_linear_(empty(rows, n), empty(rows, k), plain)


def tiles(n: int, k: int, group: int, device: torch.device, *, paired: bool = False) -> kernels.W4Tiles:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    # about what a layer's weights are: the product of a normal x has a variance near 1
    scale = (torch.rand(n, k // group) + 0.5) * 0.2 * k**-0.5
    zero = torch.randint(0, 16, (n, k // group), dtype=torch.uint8)
    return kernels.pack_w4(codes.to(device), scale.half().to(device), zero.to(device), paired=paired)


def loosen(k: int, dtype: torch.dtype) -> float:
    """The reference rounds each weight to half precision, the kernels do not (few rows) or once more (many)."""
    return 2 + k / 2048


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 128), (96, 192, 64), (32, 160, 32)])
def test_tiles_give_back_what_they_were_made_of(n, k, group, paired):
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, k // group).half()
    zero = torch.randint(0, 16, (n, k // group), dtype=torch.uint8)
    back = kernels.unpack_w4(kernels.pack_w4(codes, scale, zero, paired=paired))
    for before, after in zip((codes, scale, zero), back, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rows", "n", "k", "group"), SHAPES)
class TestAgainstReference:
    def test_linear(self, rows, n, k, group, dtype, device):
        weight, x = tiles(n, k, group, device), normal(rows, k, dtype=dtype, device=device)
        bias = normal(n, dtype=dtype, device=device)
        expected = reference.w4_linear(x, weight, bias)
        assert_close(triton_w4.w4_linear(x, weight, bias), expected, loosen=loosen(k, dtype))

    def test_norm_linear(self, rows, n, k, group, dtype, device):
        weight, x = tiles(n, k, group, device), normal(rows, k, dtype=dtype, device=device, scale=3)
        norm_weight = normal(k, dtype=dtype, device=device)
        expected = reference.norm_w4_linear(x, norm_weight, EPS, weight)
        assert_close(triton_w4.norm_w4_linear(x, norm_weight, EPS, weight), expected, loosen=loosen(k, dtype))

    def test_norm_linear_silu(self, rows, n, k, group, dtype, device):
        weight = tiles(n // 32 * 32, k, group, device, paired=True)
        x, norm_weight = normal(rows, k, dtype=dtype, device=device), normal(k, dtype=dtype, device=device)
        expected = reference.norm_w4_linear_silu(x, norm_weight, EPS, weight)
        actual = triton_w4.norm_w4_linear_silu(x, norm_weight, EPS, weight)
        assert_close(actual, expected, loosen=2 * loosen(k, dtype))

    def test_add_linear_writes_in_place(self, rows, n, k, group, dtype, device):
        weight, x = tiles(n, k, group, device), normal(rows, k, dtype=dtype, device=device)
        residual = normal(rows, n, dtype=dtype, device=device, scale=4)
        expected = reference.add_w4_linear_(residual.clone(), x, weight)
        returned = triton_w4.add_w4_linear_(residual, x, weight)
        assert returned.data_ptr() == residual.data_ptr()
        assert_close(residual, expected, loosen=2 * loosen(k, dtype))


@pytest.mark.parametrize("paired", [False, True])
def test_expanded_weights_are_the_references_bit_for_bit(device, paired):
    weight = tiles(96, 288, 32, device, paired=paired)
    for dtype in (torch.float16, torch.float32):
        actual = triton_w4.w4_expand(weight, dtype)
        torch.testing.assert_close(actual, reference.w4_expand(weight, dtype), rtol=0, atol=0)


def test_one_row_among_others_is_what_it_is_alone(device):
    """Zeros of a batch's unused columns must not reach its used ones."""
    weight, x = tiles(64, 256, 128, device), normal(5, 256, dtype=torch.float16, device=device)
    together = triton_w4.w4_linear(x, weight)
    for row in range(5):
        assert_close(triton_w4.w4_linear(x[row : row + 1], weight), together[row : row + 1])


SHARES = [(1, 3, 2, 1, 128), (1, 2, 4, 2, 64), (1, 1, 2, 2, 64), (4, 1, 4, 1, 128), (4, 1, 4, 2, 64)]


@pytest.mark.parametrize(
    ("rows", "turns", "warps", "along_k", "num_out", "held"),
    [*((*share, held) for share in SHARES for held in (False, True)), (16, 5, 1, 1, 64, False)],
)
def test_programs_and_warps_that_share_a_row_of_tiles_or_take_several(
    rows, turns, warps, along_k, num_out, held, device
):
    """Three turns of a row of four tiles: whole rows, and parts that the last program adds; one turn: parts only.

    Held where turns divide a row, else it is not: the result is the same.
    """
    weight, x = tiles(num_out, 512, 128, device), normal(rows, 512, dtype=torch.float16, device=device, scale=3)
    norm_weight = normal(512, dtype=torch.float16, device=device)
    expected = reference.norm_w4_linear(x, norm_weight, EPS, weight)
    for norm in (True, False) if rows == 1 else (True,):
        config = tuning.W4FewConfig(warps, turns, True, 128, along_k, held, norm)
        with tuning.using([tables.Entry(tables.Key("w4_few", num_out, 512, False, 2), rows, config)]):
            for _ in range(2 if norm else 1):  # the counters are zeros again after the first
                actual = triton_w4.norm_w4_linear(x, norm_weight, EPS, weight)
                assert_close(actual, expected, loosen=loosen(512, torch.float16))


@pytest.mark.parametrize("scale", [1e-4, 3000.0])
def test_a_norm_inside_the_product_takes_what_a_norm_before_it_takes(scale, device):
    """x · norm weight alone would leave float16's range at either end: it is divided by a power of two first."""
    weight, x = tiles(64, 256, 128, device), normal(1, 256, dtype=torch.float16, device=device, scale=scale)
    norm_weight = normal(256, dtype=torch.float16, device=device, scale=30)
    expected = reference.norm_w4_linear(x, norm_weight, EPS, weight)
    actual = triton_w4.norm_w4_linear(x, norm_weight, EPS, weight)
    assert actual.isfinite().all()
    scale_of_sums = expected.abs().max().item()
    torch.testing.assert_close(actual / scale_of_sums, expected / scale_of_sums, rtol=4e-3, atol=2e-3)


def test_warps_share_out_all_rows_of_tiles():
    """A warp without rows of its own would read beyond the weights: by the rule, and by each measured entry."""
    for num_out in (32, 96, 576, 896, 4096, 28672):
        for rows in (1, 8, 16):
            config = tuning.w4_few_config(90, rows, num_out, 4096, paired=False, group_size=128)
            assert num_out // 32 % (config.num_warps // config.along_k) == 0
    entries = tables.read(tables.packaged_path(90), 90, tuning.CONFIGS)
    measured = [entry for entry in entries if entry.key.kernel == "w4_few"]
    assert measured
    for key, _, config, _ in measured:
        assert config.num_warps % config.along_k == 0
        assert key.num_out // 32 % (config.num_warps // config.along_k) == 0
        assert key.num_in // 128 % config.along_k == 0
        assert not config.held or key.num_in // 128 // config.along_k % config.turns == 0


@triton.jit
def _pieces_kernel(out_ptr, pieces, whole, rest, share, units):
    for s in range(pieces):
        piece = piece_of(s, tl.program_id(0), tl.num_programs(0), whole, rest, share, units)
        for i in tl.static_range(6):
            tl.store(out_ptr + (tl.program_id(0) * pieces + s) * 6 + i, piece[i])


# (tiles, units, slots): one wave and a bit; parts that end where tiles end; that do not; fewer tiles than slots; one
PLANS = [(11, 8, 6), (10, 8, 6), (9, 12, 7), (17, 5, 6), (3, 32, 8), (5, 7, 8), (12, 3, 6), (1, 1, 6), (2, 64, 40)]


@pytest.mark.parametrize(("tiles", "units", "slots"), PLANS)
def test_every_unit_of_every_tile_is_computed_once(tiles, units, slots, device):
    shares = share_out(tiles, units, slots)
    assert shares.programs <= slots
    out = torch.zeros(shares.programs, shares.pieces, 6, dtype=torch.int32, device=device)
    _pieces_kernel[(shares.programs,)](out, *shares[1:5], units)
    found: dict[int, list[tuple[int, ...]]] = {}
    for program, pieces in enumerate(out.tolist()):
        own = [piece for piece in pieces if piece[1] < piece[2]]
        assert own == pieces[: len(own)], "empty ones come last"
        assert all(part >= adding for _, _, _, part, parts, adding in own[:-1] if parts > 1), "only the last one waits"
        for tile, *rest in own:
            found.setdefault(tile, []).append((program, *rest))
    assert sorted(found) == list(range(tiles))
    for pieces in found.values():
        programs, starts, ends, order, parts, adding = zip(*pieces, strict=True)
        assert (starts[0], ends[-1]) == (0, units)
        assert starts[1:] == ends[:-1]
        assert list(order) == list(range(len(pieces)))
        assert set(parts) == {len(pieces)}
        assert len(pieces) <= shares.parts
        assert 1 <= adding[0] <= len(pieces)
        assert list(programs) == list(range(programs[0], programs[0] + len(pieces)))


def test_tiles_of_the_hopper_kernel_hold_whole_rows_of_tiles():
    """It knows no others; a matrix of an odd number of them is for the other kernel."""
    for num_out in (64, 192, 896, 2048, 4096, 6144, 16384, 28672):
        for rows in (17, 40, 64, 80, 128, 144, 256, 320, 512, 8192):
            config = tuning.w4_hopper_config(rows, num_out, 4096, paired=False)
            assert config is not None
            assert num_out % (16 * config.num_warps * config.high) == 0
    assert tuning.w4_hopper_config(64, 96, 4096, paired=False) is None


def test_without_its_gluon_kernel_a_hopper_does_as_other_cards(monkeypatch):
    weight, x = tiles(64, 256, 128, torch.device("cpu")), torch.ones(20, 256, dtype=torch.float16)
    monkeypatch.setattr(triton_w4, "arch", lambda device: 90)
    assert triton_w4._hopper_config(x, weight) == tuning.w4_hopper_config(20, 64, 256, paired=False)
    monkeypatch.setattr(triton_w4, "launch_wide_hopper", None)
    assert triton_w4._hopper_config(x, weight) is None


def test_programs_of_a_wave_have_about_as_much_to_do():
    for tiles, units in [(224, 32), (32, 112), (48, 32), (32, 32), (128, 16), (448, 32)]:
        shares = share_out(tiles, units, 132)
        assert shares.whole * units + shares.share <= 1.5 * tiles * units / 132 + 4


HOPPER_CONFIGS = [
    (32, 4, 1, 4, 4),
    (64, 4, 1, 5, 2),
    (64, 4, 2, 5, 2),
    (64, 4, 1, 3, 4),
    (128, 4, 1, 3, 2),
    (128, 4, 2, 3, 2),
]
HOPPER_CONFIGS += [(128, 8, 1, 5, 1), (256, 8, 1, 3, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("config", HOPPER_CONFIGS)
@pytest.mark.parametrize("group", [128, 32])
def test_each_form_of_the_hopper_kernel_gives_one_result(config, group, device):
    """Tiles shared evenly, unevenly and not at all; rows that fill no tile; again and again the same bits."""
    if triton_w4.arch(device) != 90:
        pytest.skip("for Hopper")
    for rows, n, k in [(200, 6144, 1024), (40, 1408, 4096), (257, 2048, 2048)]:
        weight, x = tiles(n, k, group, device), normal(rows, k, dtype=torch.float16, device=device)
        expected = reference.w4_linear(x, weight, None)
        entry = tables.Entry(tables.Key("w4_hopper", n, k, False, 2), None, tuning.W4HopperConfig(*config))
        with tuning.using([entry]):
            first = triton_w4.w4_linear(x, weight)
            assert_close(first, expected, loosen=loosen(k, torch.float16))
            for _ in range(20):  # the counters are zeros again after each
                assert torch.equal(triton_w4.w4_linear(x, weight), first)


def test_groups_that_no_kernel_takes_are_named():
    with pytest.raises(KernelError, match="groups of"):
        kernels.pack_w4(torch.zeros(8, 96, dtype=torch.uint8), torch.ones(8, 2), torch.zeros(8, 2, dtype=torch.uint8))


def test_an_x_of_another_width_is_named(device):
    with pytest.raises(KernelError, match=r"\[T, 256\], got \[1, 128\]"):
        triton_w4.w4_linear(torch.ones(1, 128, device=device), tiles(32, 256, 128, device))
