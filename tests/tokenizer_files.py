"""Texts that break tokenizers, and folders of tokenizer files, for the tests of both."""

import json
from pathlib import Path
from typing import Any

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a model answers in the terminal after one command",
    "the answer is there, the other one is not; and then?",
    "numbers such as 1999 and 20,000 and 3.14",
] * 5
TEXTS = [
    "",
    " ",
    "   ",
    "Hello world! 123",
    "in 1999 there were 20,000 of 3.14e-10",
    "x²+½=٣٤",
    "  two  spaces\n\n\n\tand\ttabs \n",
    "日本語のテキスト、中文。",
    "🙂👨‍👩‍👧 e\u0301 é",
    "def f(x):\n    return {'a': x + 1}\n",
    "I'll can't WE'RE we've",
    "a\u00a0b\u2003c",
    "\r\n \r\n",
    "ａｂｃ１２３",
    "\x00\x01\x7f",
    "Ġ Ċ ▁ <0x0A>",
    "<|im_start|>user<|im_end|>",
]


def folder_with(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (path / name).write_bytes(data)
    return path
