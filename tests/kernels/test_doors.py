"""One signature for each op: the door's, the reference's and Triton's."""

import inspect
from importlib import import_module
from types import ModuleType

import pytest

from lmtool import kernels

FAMILIES = (
    "activation",
    "all_reduce",
    "attention",
    "blocks",
    "kv",
    "linear",
    "norm",
    "rotary",
    "sampling",
    "step",
    "w4",
)
NOT_OPS = {
    "BlockPieces",
    "DecodePlan",
    "KV_BLOCK",
    "KV_SCHEMES",
    "KvScheme",
    "Peers",
    "QuantizedKv",
    "StepRows",
    "VECTOR_BYTES",
    "W4_LARGEST_GROUP",
    "W4Tiles",
    "block_pieces",
    "compile_ahead",
    "empty_kv",
    "empty_w4",
    "force",
    "implementation",
    "is_capturable",
    "kv_block_bytes",
    "pack_w4",
    "unpack_w4",
}
SHARED = {"rotate_heads"}  # between reference modules
OPS = sorted(set(kernels.__all__) - NOT_OPS)


def ops_of(module: ModuleType) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and name in OPS
    }


def implementations(kind: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for family in FAMILIES:
        found |= ops_of(import_module(f"lmtool.kernels.{kind}.{family}"))
    return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_a_twin_has_the_doors_signature(op, kind):
    door, twin = getattr(kernels, op), implementations(kind)[op]
    assert inspect.signature(twin) == inspect.signature(door)
    assert door.__doc__, f"{op} says no shapes"


def test_every_reference_op_stands_behind_the_door():
    for family in FAMILIES:
        module = import_module(f"lmtool.kernels.reference.{family}")
        own = {n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__}
        assert {name for name in own if not name.startswith("_")} <= set(OPS) | SHARED
