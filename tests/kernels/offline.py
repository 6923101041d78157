"""Compiles every kernel for a card that is not there: `python -m tests.kernels.offline 80 90` prints JSON lines.

The real launchers run on tensors of the meta device; each launch is compiled for the asked card instead of launched.
Runs in a process of its own, without TRITON_INTERPRET (compiling and interpreting exclude each other).
"""

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from lmtool.kernels import Peers
from lmtool.kernels.kv_layout import KV_SCHEMES, KvScheme, QuantizedKv, kv_shapes
from lmtool.kernels.triton import (
    activation,
    all_reduce,
    attention,
    kv,
    kv_decode,
    launch,
    linear,
    norm,
    paged,
    prefill,
    rotary,
    sampling,
    w4,
    w4_few,
    w4_wide_hopper,
)
from lmtool.kernels.w4_layout import W4Tiles
from tests.kernels import sass

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
_OPTIONS = {"num_warps", "num_stages", "launch_pdl", "maxnreg"}


def compile_for(capability: int, function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One launch → a compiled kernel, specialised as the launcher would (pointers and sizes divisible by 16)."""
    options = {name: kwargs[name] for name in kwargs.keys() & _OPTIONS}
    given = inspect.signature(function.fn).bind(*args, **{k: v for k, v in kwargs.items() if k not in _OPTIONS})
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, (name, value)) in enumerate(zip(function.params, given.arguments.items(), strict=True)):
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}[{block}],{value.layout!r}>"
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    source = (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_linear(dtype: torch.dtype, rows: int, hidden: int, inner: int) -> None:
    x, norm_weight = meta(rows, hidden, dtype=dtype), meta(hidden, dtype=dtype)
    weight, bias = meta(hidden, hidden, dtype=dtype), meta(hidden, dtype=dtype)
    linear.linear(x, weight, bias)
    linear.norm_linear(x, norm_weight, 1e-5, weight)
    linear.norm_linear_silu(x, norm_weight, 1e-5, meta(2 * inner, hidden, dtype=dtype))
    linear.add_linear_(x, meta(rows, inner, dtype=dtype), meta(hidden, inner, dtype=dtype))


def launch_w4(dtype: torch.dtype, rows: int, num_out: int, num_in: int, group_size: int = 128) -> None:
    x, norm_weight = meta(rows, num_in, dtype=dtype), meta(num_in, dtype=dtype)
    words = meta(num_out // 32, num_in // 128, 512 + 32 * (128 // group_size), dtype=torch.int32)
    w4.norm_w4_linear_silu(x, norm_weight, 1e-5, W4Tiles(words, num_out, num_in, paired=True))
    w4.add_w4_linear_(meta(rows, num_out, dtype=dtype), x, W4Tiles(words, num_out, num_in))


def launch_decode(dtype: torch.dtype, heads: tuple[int, int, int], batch_size: int) -> None:
    hq, hkv, d = heads
    cache, table = meta(hkv, 1000, 64, d, dtype=dtype), meta(batch_size, 64, dtype=torch.int32)
    lengths = meta(batch_size, dtype=torch.int32)
    plan = attention.plan_decode(lengths, hkv)
    attention.attention_decode(meta(batch_size, hq, d, dtype=dtype), cache, cache, table, lengths, 0.1, 0, plan)


def launch_prefill(dtype: torch.dtype, heads: tuple[int, int, int], window: int = 0) -> None:
    hq, hkv, d = heads
    cache, table = meta(hkv, 1000, 64, d, dtype=dtype), meta(4, 64, dtype=torch.int32)
    bounds, q, lengths = meta(5, dtype=torch.int32), meta(512, hq, d, dtype=dtype), meta(4, dtype=torch.int32)
    attention.attention_prefill(q, cache, cache, table, bounds, lengths, 512, 0.1, window)


def quantized(scheme: KvScheme, num_kv_heads: int, head_dim: int) -> QuantizedKv:
    shapes = kv_shapes(scheme, num_kv_heads, 1000, head_dim)
    k, v = (meta(*shapes[name], dtype=torch.uint8) for name in ("k", "v"))
    return QuantizedKv(k, v, meta(*shapes["k_meta"]), meta(*shapes["v_meta"]), head_dim, scheme)


def launch_kv_write(dtype: torch.dtype, heads: tuple[int, int, int], scheme: KvScheme) -> None:
    hq, hkv, d = heads
    qkv, cos_sin, norm_weight = meta(4, (hq + 2 * hkv) * d, dtype=dtype), meta(4, d, dtype=torch.float32), meta(d)
    slots = meta(4, dtype=torch.int64)
    kv.kv_store(qkv, cos_sin, slots, quantized(scheme, hkv, d), norm_weight, norm_weight)


def launch_kv_copy(num_kv_heads: int, head_dim: int) -> None:
    eight, blocks = quantized("int8", num_kv_heads, head_dim), meta(4, dtype=torch.int32)
    for target in (eight, quantized("int4", num_kv_heads, head_dim)):
        kv.kv_copy(eight, blocks, target, blocks)


def launch_kv_read(dtype: torch.dtype, heads: tuple[int, int, int], scheme: KvScheme, window: int = 0) -> None:
    """The kernels for every card and type; 'int4' beside open blocks."""
    hq, hkv, d = heads
    lengths, table = meta(4, dtype=torch.int32), meta(4, 64, dtype=torch.int32)
    own = (quantized("int8", hkv, d), lengths) if scheme == "int4" else (None, None)
    cache = paged.quantized(quantized(scheme, hkv, d), *own)
    plan = attention.plan_decode(lengths, hkv)
    attention.launch_decode(meta(4, hq, d, dtype=dtype), cache, table, lengths, 0.1, window, plan)
    bounds, q = meta(5, dtype=torch.int32), meta(512, hq, d, dtype=dtype)
    prefill.launch_prefill(q, cache, table, bounds, lengths, 512, 0.1, window)


def launch_kv_decode(dtype: torch.dtype, heads: tuple[int, int, int], scheme: KvScheme) -> None:
    """The kernel for half precision from Ampere on; 'int4' beside open blocks."""
    hq, hkv, d = heads
    q, cache = meta(4, hq, d, dtype=dtype), quantized(scheme, hkv, d)
    lengths, table = meta(4, dtype=torch.int32), meta(4, 64, dtype=torch.int32)
    own = (quantized("int8", hkv, d), lengths) if scheme == "int4" else (None, None)
    if kv_decode.serves(q, cache):
        plan = attention.plan_decode(lengths, hkv)
        kv_decode.kv_attention_decode(q, cache, table, lengths, 0.1, 0, plan, *own)


def launch_rest(dtype: torch.dtype) -> None:
    norm.rms_norm(meta(32, 4096, dtype=dtype), meta(4096, dtype=dtype), 1e-5)
    activation.silu_mul(meta(32, 8192, dtype=dtype))
    counts = [meta(4096, dtype=torch.int32), meta(1, dtype=torch.int32)]
    for size in (2, 4):
        peers = Peers(0, size, 1 << 20, meta(size, dtype=torch.int64), *counts)
        all_reduce.add_all_reduce_(meta(32, 8192, dtype=dtype), meta(32, 8192, dtype=dtype), peers)
    cache, qkv, cos_sin = (
        meta(8, 100, 64, 128, dtype=dtype),
        meta(4, 48 * 128, dtype=dtype),
        meta(4, 128, dtype=torch.float32),
    )
    norm_weight, slots = meta(128, dtype=dtype), meta(4, dtype=torch.int64)
    rotary.rope_store(qkv, cos_sin, slots, cache, cache, norm_weight, norm_weight)
    logits, numbers = meta(4, 128256, dtype=torch.float32), meta(4, dtype=torch.float32)
    wide, narrow = meta(4, dtype=torch.int64), meta(4, dtype=torch.int32)
    sampling.sample(logits, numbers, narrow, numbers, numbers, wide, wide)
    seen, counts = meta(4, 128256, dtype=torch.bool), meta(4, 128256, dtype=torch.int32)
    sampling.penalize_(logits, seen, counts, numbers, numbers, numbers)
    sampling.mask_(logits, narrow, meta(4, 4008, dtype=torch.int32))


def launch_each_once() -> None:
    """Every kernel, in one form: enough to know that a card's code can be made."""
    launch_rest(torch.float16)
    launch_decode(torch.float16, (32, 8, 128), 4)
    launch_prefill(torch.float16, (32, 8, 128))
    launch_kv_write(torch.float16, (32, 8, 128), "k8v4")
    launch_kv_copy(8, 128)
    launch_kv_read(torch.float16, (32, 8, 128), "int4")
    launch_kv_decode(torch.float16, (32, 8, 128), "int4")
    w4.w4_expand(W4Tiles(meta(64, 16, 544, dtype=torch.int32), 2048, 2048), torch.float16)
    launch_w4(torch.float16, 64, 2048, 2048)
    for rows in (1, 16):
        launch_w4(torch.float16, rows, 2048, 2048)
        norm_weight, weight = meta(2048), meta(2 * 8192, 2048)
        linear.norm_linear_silu(meta(rows, 2048), norm_weight, 1e-5, weight)


def launch_main_shapes() -> None:
    """What an 8B and a 1.8B model use, and the head dims that need most registers."""
    launch_rest(torch.float16)
    launch_linear(torch.float16, 1, 4096, 14336)
    launch_linear(torch.float16, 16, 4096, 14336)
    linear.linear(meta(16, 4096, dtype=torch.bfloat16), meta(4096, 4096, dtype=torch.bfloat16))
    for batch_size in (4, 16, 256):  # each has a configuration of its own
        launch_decode(torch.float16, (32, 8, 128), batch_size)
    for rows in (1, 8, 16, 64, 256):
        launch_w4(torch.float16, rows, 4096, 4096)
    launch_w4(torch.float16, 1, 6144, 4096)  # a loop with the norm in it
    launch_w4(torch.float16, 1, 28672, 4096)
    launch_w4(torch.float16, 64, 28672, 4096)
    launch_w4(torch.float16, 256, 28672, 4096)
    launch_w4(torch.float16, 1, 4096, 4096, group_size=32)
    launch_w4(torch.bfloat16, 1, 4096, 4096)
    launch_w4(torch.bfloat16, 64, 4096, 4096)
    launch_w4(torch.float16, 256, 4096, 4096, group_size=32)
    launch_w4(torch.float16, 64, 96, 256)  # not for the kernel that is Hopper's own
    w4.w4_expand(W4Tiles(meta(128, 32, 544, dtype=torch.int32), 4096, 4096), torch.float16)
    launch_decode(torch.bfloat16, (32, 8, 128), 4)
    launch_decode(torch.float16, (32, 32, 80), 4)
    launch_decode(torch.float16, (8, 1, 256), 4)
    launch_prefill(torch.bfloat16, (32, 8, 128))
    launch_prefill(torch.float16, (8, 1, 256), window=1000)
    launch_kv_copy(8, 128)
    launch_kv_copy(8, 256)
    for scheme in ("int8", "k8v4", "static"):
        launch_kv_write(torch.bfloat16, (32, 8, 128), scheme)
        launch_kv_read(torch.bfloat16, (32, 8, 128), scheme)
    launch_kv_read(torch.float16, (32, 8, 128), "int4")
    launch_kv_read(torch.float16, (32, 32, 80), "int4", window=1000)
    launch_kv_read(torch.float16, (8, 1, 256), "int8")
    for scheme in KV_SCHEMES:
        launch_kv_decode(torch.float16, (32, 8, 128), scheme)
    launch_kv_decode(torch.bfloat16, (24, 2, 80), "int4")


def look_of(kernel: JITFunction, kwargs: dict[str, Any]) -> tuple[tuple[str, ...], Callable[[sass.Code], Any]] | None:
    """Which settings of a kernel for Hopper are told, and what its instructions are."""
    if kernel is attention._decode_kernel:
        return ("D", "BLOCK_T", "num_warps"), lambda code: {"loop": len(sass.product_loop(code))}
    if kernel is kv_decode.kv_decode_kernel:
        return ("DIM",), lambda code: counted(sass.product_loop(code))
    if kernel is w4_few.few_rows_kernel:
        names = ("VALUES", "GROUPS", "TURNS", "HELD", "NORM", "num_warps")
        if kwargs["HELD"]:
            return names, lambda code: counted(sass.instructions(code))
        return names, lambda code: counted(sass.straight(sass.product_loop(code)))
    if kernel is w4_wide_hopper.wide_hopper_kernel:
        return ("BM", "HIGH", "GROUPS", "num_warps"), wide_loop
    return None


def counted(body: list[str]) -> dict[str, int]:
    return {"loop": len(body), "conversions": sum("I2F" in instruction for instruction in body)}


def wide_loop(code: sass.Code) -> dict[str, int]:
    body = sass.product_loop(code)
    return {
        "loop": len(body),
        "waits": sum("WARPGROUP.DEPBAR" in instruction for instruction in body),
        "products": sum("HGMMA" in instruction for instruction in body),
    }


def main(capabilities: list[int]) -> None:
    told: list[dict[str, Any]] = []
    looks: list[tuple[dict[str, Any], bytes, Callable[[sass.Code], Any]]] = []

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = compile_for(capability, self, args, kwargs)
        cubin = compiled.asm["cubin"]
        found = {"kernel": self.fn.__name__, "capability": capability, **sass.resources(cubin)}
        found["shared"] = compiled.metadata.shared  # bytes; what is in the file leaves out what is asked for at launch
        found["scheme"] = kwargs.get("SCHEME", "dense")
        told.append(found)
        look = look_of(self, kwargs) if capability == launch.HOPPER else None
        if look is not None:
            found |= {name: kwargs[name] for name in look[0]}
            looks.append((found, cubin, look[1]))

    JITFunction.run = compile_instead
    for capability in capabilities:
        for module in (launch, linear, attention, prefill, kv_decode, w4):
            module.arch = lambda device, capability=capability: capability
        launch_main_shapes() if capability >= launch.HOPPER else launch_each_once()
    if looks:
        for (found, _, look), code in zip(looks, sass.disassemble([cubin for _, cubin, _ in looks]), strict=True):
            found |= look(code)
    for found in told:
        print(json.dumps(found))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
