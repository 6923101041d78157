"""Calibration text → token ids: files and folders of txt, jsonl and json, read without a network.

Conversations go through the model's chat template; plain texts are joined by blank lines and cut. Does not know models.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtool.errors import ConfigError
from lmtool.quant.hub_datasets import hub_texts
from lmtool.quant.options import HUB_DATASETS, CalibrationOptions
from lmtool.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md", ".jsonl", ".json")
_CHARACTERS_A_TOKEN = 16  # at most, in any text that is language
_TEXT_KEYS = ("text", "content")
_MESSAGE_KEYS = ("messages", "conversations", "conversation")


def calibration_ids(options: CalibrationOptions, tokenizer: Tokenizer) -> Tensor:
    """ids int64 [samples, seqlen], stretches spread evenly over the text, the seed saying where in each share.

    Raises ConfigError for a file that is missing, is not what its name says or holds too little text.
    """
    if options.dataset in HUB_DATASETS and not Path(options.dataset).exists():
        enough = _CHARACTERS_A_TOKEN * options.samples * options.seqlen
        ids = [token for text in hub_texts(options.dataset, enough) for token in _encode(text, tokenizer)]
    else:
        ids = text_ids(Path(options.dataset), tokenizer)
    wanted = options.samples * options.seqlen
    if len(ids) < wanted:
        fits = len(ids) // options.seqlen
        raise ConfigError(
            f"{options.dataset} holds {len(ids):,} tokens, {options.samples} of {options.seqlen} are {wanted:,}",
            f"give more text, or --calib-samples {fits}" if fits else "give more text, or a shorter --calib-seqlen",
        )
    share = len(ids) // options.samples
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.randint(0, share - options.seqlen + 1, (options.samples,), generator=generator).tolist()
    flat = torch.tensor(ids)
    starts = (i * share + offset for i, offset in enumerate(offsets))
    return torch.stack([flat[start : start + options.seqlen] for start in starts])


def text_ids(path: Path, tokenizer: Tokenizer, flag: str = "--calib-dataset") -> list[int]:
    """All tokens of a file's or a folder's documents, one after the other. Raises ConfigError, which names ``flag``."""
    return [token for text in _documents(path, flag) for token in _encode(text, tokenizer)]


# ------------------------------------------------------------------ files

Document = str | list[dict[str, Any]]  # a text, or the messages of a conversation


def _documents(path: Path, flag: str) -> Iterator[Document]:
    for file in _files(path, flag):
        try:
            yield from _read(file, flag)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{flag} {file} is not UTF-8 text: {error.reason}", "convert it") from None
        except OSError as error:
            raise ConfigError(f"{flag} {file} cannot be read: {error.strerror}", "give another file") from None


def _files(path: Path, flag: str) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{flag} {path} is none of {', '.join(SUFFIXES)}", "rename or convert it")
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{flag} {path} does not exist", "give a file or a folder of text")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"{flag} {path} holds no {', '.join(SUFFIXES)}", "give a folder with such files")
    return files


def _read(file: Path, flag: str) -> Iterable[Document]:
    text = file.read_text(encoding="utf-8")
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        lines = [line for line in text.splitlines() if line.strip()]
        places = [f"{flag} {file}, line {i + 1}" for i in range(len(lines))]
        return [_document(_json(line, place), place) for line, place in zip(lines, places, strict=True)]
    if suffix == ".json":
        value = _json(text, f"{flag} {file}")
        # one conversation is a list of messages; anything else that is a list holds documents
        if isinstance(value, list) and not _is_conversation(value):
            return [_document(item, f"{flag} {file}, entry {i + 1}") for i, item in enumerate(value)]
        return [_document(value, f"{flag} {file}")]
    return [text]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}", "mend or remove it") from None


def _document(value: Any, where: str) -> Document:
    if isinstance(value, str):
        return value
    if _is_conversation(value):
        return list(value)
    if isinstance(value, dict):
        for key in _MESSAGE_KEYS:
            if _is_conversation(value.get(key)):
                return list(value[key])
        for key in _TEXT_KEYS:
            if isinstance(value.get(key), str):
                return str(value[key])
    raise ConfigError(
        f"{where} holds neither a text nor messages",
        'give "…", {"text": "…"} or {"messages": [{"role": …, "content": …}]}',
    )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and "role" in item and "content" in item for item in value)
    )


def _encode(document: Document, tokenizer: Tokenizer) -> list[int]:
    if isinstance(document, list):
        return tokenizer.chat_ids(document, add_generation_prompt=False)
    return tokenizer.encode(document, add_special=False) + tokenizer.encode("\n\n", add_special=False)
