"""A model's tokenizer into a folder: a folder's own files as they are, a GGUF's in Hugging Face's form.

Only data is copied, never code. Does not know models' weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lmtool.checkpoint.manifest import MANIFEST
from lmtool.errors import TokenizerError
from lmtool.tokenizer.bpe import BpeVocabulary
from lmtool.tokenizer.sentencepiece_model import SentencePieceVocabulary
from lmtool.tokenizer.tokenizer import Tokenizer

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path) -> list[str]:
    """Write what `load_tokenizer(folder)` and transformers need; the names of the files.

    tokenizer: as `load_tokenizer(source)` gave it. Raises TokenizerError where a folder has no tokenizer to copy.
    """
    if not source.is_dir():
        return _write(tokenizer, folder)
    files = _copy(source, folder)
    if (source / MANIFEST).exists() and tokenizer.chat_template is not None:  # a workspace keeps it there
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        files.append("chat_template.jinja")
    return files


def _copy(source: Path, folder: Path) -> list[str]:
    files = sorted({file for pattern in COPIED for file in source.glob(pattern)})
    if not any(file.name.startswith("tokenizer.") or file.suffix == ".tiktoken" for file in files):
        raise TokenizerError(f"{source} holds no tokenizer", "download its files into it")
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in files]


def _write(tokenizer: Tokenizer, folder: Path) -> list[str]:
    vocabulary = tokenizer.vocabulary
    settings: dict[str, Any] = dict(tokenizer.tokens)
    if isinstance(vocabulary, BpeVocabulary):
        name, settings["tokenizer_class"] = "tokenizer.json", "PreTrainedTokenizerFast"
        text = vocabulary.tokenizer_json(tokenizer.prefix_ids, tokenizer.suffix_ids)
        (folder / name).write_text(text, encoding="utf-8")
    else:
        assert isinstance(vocabulary, SentencePieceVocabulary)
        name, settings["tokenizer_class"] = "tokenizer.model", "LlamaTokenizer"
        (folder / name).write_bytes(vocabulary.model_file())
    settings["add_bos_token"] = tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.prefix_ids
    settings["add_eos_token"] = bool(tokenizer.suffix_ids)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    generation = {"eos_token_id": sorted(tokenizer.eos_ids)}
    if tokenizer.bos_id is not None:
        generation["bos_token_id"] = tokenizer.bos_id  # type: ignore[assignment]
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    return [name, "tokenizer_config.json", "generation_config.json"]
