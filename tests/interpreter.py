"""Triton's interpreter without the work that changes nothing; what is computed is the same with and without this.

At each call of a @jit function by a kernel it looks through all of triton.language to put its own functions there,
though the launch did so already and takes them out at its end: 38 of 85 s of a test of 4-bit products.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Where Triton's own way is another than that of 3.6 to 3.9, nothing is changed."""
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _PatchOnce(interpreter._patch_lang, interpreter._LangPatchScope)


class _PatchOnce:
    """In `_patch_lang`'s place. The first call of a launch is the kernel's, and its scope is the only one restored."""

    def __init__(self, patch: Callable[[Any], Any], scope: Callable[[], Any]) -> None:
        self._patch, self._scope = patch, scope
        self._patched: list[ModuleType] = []  # by the launch that runs

    def __call__(self, function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if seen and all(module in self._patched for module in seen):
            return self._scope()
        made = self._patch(function)
        if not self._patched:
            restore = made.restore

            def restore_and_forget() -> None:
                self._patched.clear()
                restore()

            made.restore = restore_and_forget
        self._patched += seen
        return made
