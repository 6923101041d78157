"""Texts that break tokenizers, and folders of tokenizer files, for the tests of both."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from lmtool.tokenizer.bpe import PRE_TOKENIZERS

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


def byte_level_json() -> LibraryTokenizer:
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"][0]), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(SENTENCES, trainer)
    library.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|im_end|>", special=True)])
    library.add_tokens([AddedToken("<think>", special=False)])
    begin = library.token_to_id("<|begin|>")
    library.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return library
