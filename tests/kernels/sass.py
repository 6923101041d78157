"""What is in a compiled kernel: its resources and its instructions, by the tools inside the Triton wheel."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import triton

Code = list[tuple[int, str]]  # address and instruction


def _tool(name: str, option: str, data: bytes, *more: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        return subprocess.run([tool, option, *more, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (spills), shared and local memory: bytes, and 32-bit registers a thread."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def disassemble(cubins: Sequence[bytes]) -> list[Code]:
    """Of kernels for Hopper. One process for all of them: each would take half a second to begin."""
    texts = [_text(cubin) for cubin in cubins]
    shown = _tool("nvdisasm", "--binary", b"".join(texts), "SM90", "--no-dataflow")
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", shown, re.MULTILINE)]
    bounds = accumulate(map(len, texts), initial=0)
    return [[one for one in code if first <= one[0] < last] for first, last in pairwise(bounds)]


def _text(cubin: bytes) -> bytes:
    """The section of a kernel's instructions in its file (ELF64)."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    named = sections[names][4]
    [(_, _, _, _, at, length)] = [one for one in sections if cubin.startswith(b".text.", named + one[0])]
    return cubin[at : at + length]


def instructions(code: Code) -> list[str]:
    return [text for _, text in code if not text.startswith("NOP")]


def product_loop(code: Code) -> list[str]:
    """The shortest loop that holds tensor-core products, instruction by instruction; [] without such a loop.

    In SASS a loop is a branch to an earlier address: `/*0a30*/ @P0 BRA 0x590`.
    """
    places = {address: i for i, (address, _) in enumerate(code)}
    bodies = []
    for end, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = instructions(code[places[int(target[1], 16)] : end + 1])
            if any("MMA" in instruction for instruction in body):
                bodies.append(body)
    return min(bodies, key=len, default=[])


def straight(body: list[str]) -> list[str]:
    """A loop's instructions up to the first branch: what every turn executes, not what some turns do at their end."""
    branch = next(i for i, instruction in enumerate(body) if re.search(r"\bBRA\b", instruction))
    return body[:branch]
