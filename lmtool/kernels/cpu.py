"""What this machine's CPU multiplies fast. Asked when needed, never at import."""

from functools import cache
from pathlib import Path


@cache
def multiplies_bfloat16() -> bool:
    """AVX512-BF16 or AMX; without them bfloat16 products are emulated and slower than float32's."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
