"""How the kernels hold a quantized K/V cache: codes, and for each group a scale and a minimum. Knows no kernel.

A number is code · scale + minimum. K lies token after token, as it is multiplied with a query; V lies transposed in its
block, dimension after dimension, as it is multiplied with a token's weight: so both are the left operand of the tensor
cores, and four codes side by side become two registers of it without moving between threads. Where codes have four
bits, a byte holds dimension d and, in its upper half, d + D/2 of one token: nobody writes into a neighbour's byte.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lmtool.errors import KernelError

KV_BLOCK = 64
# int8: K and V in 8 bits, of each token and head. k8v4: V in 4 bits. int4: K in 4 bits, of each channel of a block's
# tokens, V of each token. static: 8 bits, scale and minimum of each head's channels known beforehand.
KvScheme = Literal["int8", "k8v4", "int4", "static"]
KV_SCHEMES: tuple[KvScheme, ...] = get_args(KvScheme)
# heads are filled up to multiples of this, two tiles of the tensor cores
PAD_DIM = 32
_HALF_MAX = 65504.0


class QuantizedKv(NamedTuple):
    """K and V of one layer; DP is the head dim D filled up to a multiple of 32, NB the number of blocks.

    k       uint8 [Hkv, NB, 64, DP], of four bits [Hkv, NB, 64, DP/2]
    v       uint8 [Hkv, NB, DP, 64], of four bits [Hkv, NB, DP/2, 64]
    k_meta  float16, scale and minimum: of each token [Hkv, NB, 64, 2]; int4: of each channel [Hkv, NB, 2, DP]; static:
            of each channel, one for all blocks [Hkv, 1, 2, DP]
    v_meta  float16 [Hkv, NB, 64, 2]; static: [Hkv, 1, 2, DP]
    """

    k: Tensor
    v: Tensor
    k_meta: Tensor
    v_meta: Tensor
    head_dim: int
    scheme: KvScheme

    @property
    def num_heads(self) -> int:
        return self.k.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.k.shape[1]

    @property
    def padded_dim(self) -> int:
        return padded_dim(self.head_dim)

    @property
    def k_bits(self) -> int:
        return 4 if self.scheme == "int4" else 8

    @property
    def v_bits(self) -> int:
        return 4 if self.scheme in ("int4", "k8v4") else 8


def padded_dim(head_dim: int) -> int:
    return -(-head_dim // PAD_DIM) * PAD_DIM


def kv_shapes(scheme: KvScheme, num_heads: int, num_blocks: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Of the four tensors of a layer, by name. Raises KernelError for a scheme that is not known."""
    if scheme not in KV_SCHEMES:
        raise KernelError(f"K/V scheme {scheme!r} is not among {', '.join(KV_SCHEMES)}")
    dim = padded_dim(head_dim)
    k_dim = dim // 2 if scheme == "int4" else dim
    v_dim = dim // 2 if scheme in ("int4", "k8v4") else dim
    of_tokens, of_channels = (num_heads, num_blocks, KV_BLOCK, 2), (num_heads, num_blocks, 2, dim)
    forever = (num_heads, 1, 2, dim)
    return {
        "k": (num_heads, num_blocks, KV_BLOCK, k_dim),
        "v": (num_heads, num_blocks, v_dim, KV_BLOCK),
        "k_meta": {"int4": of_channels, "static": forever}.get(scheme, of_tokens),
        "v_meta": forever if scheme == "static" else of_tokens,
    }


def kv_block_bytes(scheme: KvScheme, num_heads: int, head_dim: int) -> int:
    """Of one block of a layer, K and V with what belongs to them."""
    dim = padded_dim(head_dim)
    codes = {"int8": 16, "static": 16, "k8v4": 12, "int4": 8}[scheme] * KV_BLOCK * dim // 8
    metas = {"int8": 8 * KV_BLOCK, "static": 0, "k8v4": 8 * KV_BLOCK, "int4": 4 * KV_BLOCK + 4 * dim}[scheme]
    return num_heads * (codes + metas)


def empty_kv(
    scheme: KvScheme,
    num_heads: int,
    num_blocks: int,
    head_dim: int,
    device: torch.device,
    parameters: tuple[Tensor, Tensor] | None = None,
) -> QuantizedKv:
    """A cache that holds nothing yet, and may hold anything. parameters: of 'static', its k_meta and v_meta.

    Raises KernelError for parameters that are missing or of another shape.
    """
    shapes = kv_shapes(scheme, num_heads, num_blocks, head_dim)
    k, v = (torch.empty(shapes[name], dtype=torch.uint8, device=device) for name in ("k", "v"))
    if scheme == "static":
        if parameters is None:
            raise KernelError("a static cache needs its parameters")
        for part in parameters:
            if part.shape not in (shapes["k_meta"], (num_heads, 1, 2, head_dim)):
                raise KernelError(f"static parameters are {tuple(part.shape)}, this cache wants {shapes['k_meta']}")
        k_meta, v_meta = (
            _fill_up(part, padded_dim(head_dim)).to(device, torch.float16).contiguous() for part in parameters
        )
    else:
        k_meta, v_meta = (
            torch.empty(shapes[name], dtype=torch.float16, device=device) for name in ("k_meta", "v_meta")
        )
    return QuantizedKv(k, v, k_meta, v_meta, head_dim, scheme)


def _fill_up(rows: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension: a scale of zero makes numbers of zero."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))


# ------------------------------------------------------------------ numbers ↔ codes
def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x float [...] in groups along ``dim`` → codes uint8 [...], scale and minimum float16, in which ``dim`` is 1.

    A group whose numbers are all one has scale 0 and is its minimum.
    """
    x = x.float()
    low = x.amin(dim, keepdim=True).clamp(-_HALF_MAX, _HALF_MAX).half()
    scale = ((x.amax(dim, keepdim=True) - low.float()) / (2**bits - 1)).clamp(0, _HALF_MAX).half()
    return to_codes(x, scale, low, bits), scale, low


def to_codes(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """The nearest codes uint8 of x float under ``scale`` and ``low``; beyond the first and the last are these."""
    step = torch.where(scale > 0, scale.float(), 1.0)
    return ((x.float() - low.float()) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def halves(codes: Tensor, dim: int) -> Tensor:
    """Codes of four bits [..., D, ...] → bytes [..., D/2, ...]: entry d of ``dim``, and d + D/2 in the upper half."""
    low, high = codes.chunk(2, dim)
    return low | high << 4


def whole(packed: Tensor, dim: int) -> Tensor:
    """The inverse of `halves`."""
    return torch.cat((packed & 0xF, packed >> 4), dim)


def numbers(cache: QuantizedKv, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """blocks int64 [n] → their K and V as float32, each [Hkv, n, 64, D]."""
    k, v = cache.k.index_select(1, blocks), cache.v.index_select(1, blocks)
    k = whole(k, -1) if cache.k_bits == 4 else k
    v = (whole(v, 2) if cache.v_bits == 4 else v).transpose(2, 3)
    metas = []
    for meta in (cache.k_meta, cache.v_meta):
        of_blocks = meta.expand(-1, len(blocks), -1, -1) if cache.scheme == "static" else meta.index_select(1, blocks)
        metas.append(of_blocks.float())
    of_channels = (cache.scheme in ("int4", "static"), cache.scheme == "static")
    found = []
    for codes, meta, channels in zip((k, v), metas, of_channels, strict=True):
        scale, low = (meta[:, :, :1], meta[:, :, 1:]) if channels else (meta[..., :1], meta[..., 1:])
        found.append((codes.float() * scale + low)[..., : cache.head_dim])
    return found[0], found[1]
