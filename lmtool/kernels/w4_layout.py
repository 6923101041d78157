"""How the kernels hold 4-bit weights: tiles in the order in which a GPU's threads want them. Knows no kernel.

A tile is 32 out features × 128 in features, 512 words of eight codes and then, for each of its one to four groups, 32
words of scale and zero point. A thread of a warp finds its four words side by side, and what it unpacks from them with
one AND for two codes is the operand of the tensor cores as the hardware hands it out (mma.m16n8k16): nothing moves
between threads. One tensor holds all of it, so that a matrix is one stream of bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmtool.errors import KernelError

TILE_N, TILE_K = 32, 128
WORDS = TILE_N * TILE_K // 8
# in features are filled up to this, two tiles
PAD_K = 2 * TILE_K
GROUP_SIZES = (32, 64, TILE_K)
W4_LARGEST_GROUP = TILE_K


class W4Tiles(NamedTuple):
    """A matrix [num_out, num_in] of w = (code - zero) · scale, 4-bit codes and zeros, float16 scales.

    tiles   int32 [⌈num_out / 32⌉, 2 · ⌈num_in / 256⌉, 512 + 32 · groups]: `pack_w4` says what stands where
    paired  rows stand as eight gates, eight ups, eight gates, …: the two products of a gated MLP meet in one thread
    """

    tiles: Tensor
    num_out: int
    num_in: int
    paired: bool = False

    @property
    def groups(self) -> int:
        """Groups of a tile: 1, 2 or 4."""
        return (self.tiles.shape[2] - WORDS) // TILE_N

    @property
    def group_size(self) -> int:
        return TILE_K // self.groups

    @property
    def padded_in(self) -> int:
        return self.tiles.shape[1] * TILE_K


def empty_w4(num_out: int, num_in: int, group_size: int, device: torch.device, *, paired: bool = False) -> W4Tiles:
    """Tiles that hold nothing yet, or on the meta device nothing ever: their shape is what kernels are compiled for."""
    rows, columns = -(-num_out // TILE_N), -(-num_in // PAD_K) * (PAD_K // TILE_K)
    words = WORDS + TILE_N * (TILE_K // group_size)
    return W4Tiles(torch.empty((rows, columns, words), dtype=torch.int32, device=device), num_out, num_in, paired)


def pack_w4(codes: Tensor, scale: Tensor, zero: Tensor, *, paired: bool = False) -> W4Tiles:
    """codes uint8 [N, K] 0..15, scale [N, K/g], zero uint8 [N, K/g] 0..15, g 32, 64 or 128 → tiles, on their device.

    In feature k = 128c + 32j + 16e + 8q + 2t + b of out feature n = 32i + 8h + g stands in tile (i, c), word
    128h + 16g + 4t + 2q + e, nibble j of its half b. ``paired``: codes are [gate; up], 16 divides N/2.
    Raises KernelError for another group size.
    """
    num_out, num_in = codes.shape
    group_size = num_in // scale.shape[1]
    if group_size not in GROUP_SIZES or group_size * scale.shape[1] != num_in:
        raise KernelError(f"4-bit kernels take groups of {GROUP_SIZES}, got {num_in} in features in {scale.shape[1]}")
    if paired:
        order = _pair_order(num_out, codes.device)
        codes, scale, zero = codes[order], scale[order], zero[order]
    per_tile = TILE_K // group_size
    codes = _fill_up(codes, TILE_N, PAD_K)
    scale, zero = (_fill_up(part, TILE_N, PAD_K // group_size) for part in (scale, zero))
    rows, columns = codes.shape[0] // TILE_N, codes.shape[1] // TILE_K
    # two codes b side by side are a 16-bit number: eight times fewer of them are moved than there are codes
    pairs = codes.contiguous().view(torch.int16).to(torch.int32)
    pairs = ((pairs & 0xF) | (pairs & 0xF00) << 8).view(-1, columns, 4, 16)  # n c j (e q t)
    words = pairs[:, :, 0] | pairs[:, :, 1] << 4 | pairs[:, :, 2] << 8 | pairs[:, :, 3] << 12
    words = words.view(rows, 4, 8, columns, 2, 2, 4).permute(0, 3, 1, 2, 6, 5, 4)  # i c h g t q e
    bits = scale.to(torch.float16).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    meta = (bits | zero.to(torch.int32) << 16).view(rows, 4, 8, columns, per_tile)
    meta = meta.permute(0, 3, 4, 2, 1)  # i c group g h
    tiles = torch.cat((words.reshape(rows, columns, WORDS), meta.reshape(rows, columns, -1)), dim=2)
    return W4Tiles(tiles, num_out, num_in, paired)


def unpack_w4(weight: W4Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_w4`: codes uint8 [N, K], scale float16 [N, K/g], zero uint8 [N, K/g]."""
    rows, columns = weight.tiles.shape[:2]
    words = weight.tiles[..., :WORDS].reshape(rows, columns, 4, 8, 4, 2, 2)
    words = words.permute(0, 2, 3, 1, 6, 5, 4).reshape(-1, columns, 16)  # n c (e q t)
    pairs = torch.empty((words.shape[0], columns, 4, 16), dtype=torch.int16, device=words.device)
    for nibble in range(4):
        shifted = words >> (4 * nibble)
        pairs[:, :, nibble] = ((shifted & 0xF) | (shifted >> 8 & 0xF00)).to(torch.int16)
    codes = pairs.view(words.shape[0], -1).view(torch.uint8)
    meta = weight.tiles[..., WORDS:].reshape(rows, columns, weight.groups, 8, 4).permute(0, 4, 3, 1, 2)
    meta = meta.reshape(rows * TILE_N, -1)
    scale = meta.to(torch.int16).view(torch.float16)
    zero = (meta >> 16).to(torch.uint8)
    num_groups = weight.num_in // weight.group_size
    parts = (codes[: weight.num_out, : weight.num_in], scale[:, :num_groups], zero[:, :num_groups])
    if weight.paired:
        back = _pair_order(weight.num_out, codes.device).argsort()
        return tuple(part[: weight.num_out][back].contiguous() for part in parts)  # type: ignore[return-value]
    return tuple(part[: weight.num_out].contiguous() for part in parts)  # type: ignore[return-value]


def _pair_order(num_out: int, device: torch.device) -> Tensor:
    """For each stored row its place in [gate; up]."""
    if num_out % 32:
        raise KernelError(f"gate and up are paired in sixteens, got {num_out // 2} rows each")
    gates = torch.arange(num_out // 2, device=device).view(-1, 8)
    return torch.stack((gates, gates + num_out // 2), dim=1).flatten()


def _fill_up(part: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros to the right and below, up to multiples: a scale of zero makes weights of zero."""
    missing = (-part.shape[1] % columns, -part.shape[0] % rows)
    return torch.nn.functional.pad(part, (0, missing[0], 0, missing[1])) if any(missing) else part
