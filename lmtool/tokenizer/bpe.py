"""The `tokenizers` library: a folder's tokenizer.json, or byte-level BPE out of a GGUF.

Does not know chat templates or which ids end an answer.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from lmtool.errors import TokenizerError
from lmtool.tokenizer.vocabulary import byte_level, sentencepiece_bytes

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> the patterns that cut text before BPE, one after the other, as llama.cpp's vocabulary has them
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class BpeVocabulary:
    """`Vocabulary` over an object of the library. Safe to call from several threads, none of which waits for another:
    whether names of special tokens are those tokens is a property of the whole object, so there are two."""

    def __init__(self, library: LibraryTokenizer, byte_level: bool, strips_leading_space: bool = False) -> None:
        self._library = library  # reads names of special tokens as those tokens
        self._plain: LibraryTokenizer | None = None  # as text; made when a text first has such a name
        self._lock = Lock()
        self.is_byte_level = byte_level
        added = library.get_added_tokens_decoder()
        # a server asks for the same tokens some ten thousand times a second
        self._bytes = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        # a name that is looked for in what the text is made into may come out of another text
        self._names = ["" if token.normalized else token.content for token in added.values() if token.special]
        self.strips_leading_space = strips_leading_space
        self.size = library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        library = self._library
        if not parse_special and any(name in text for name in self._names):
            library = self._without_special()
        return library.encode(text, add_special_tokens=False).ids

    def _without_special(self) -> LibraryTokenizer:
        with self._lock:
            if self._plain is None:
                plain = LibraryTokenizer.from_str(self._library.to_str())
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain

    def token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            token = self._library.id_to_token(token_id)
            if token is None:
                return b""
            found = self._bytes[token_id] = byte_level(token) if self.is_byte_level else sentencepiece_bytes(token)
        return found

    def token_id(self, text: str) -> int | None:
        return self._library.token_to_id(text)

    def as_json(self) -> dict[str, Any]:
        """tokenizer.json as the library has it."""
        stored: dict[str, Any] = json.loads(self._library.to_str())
        return stored

    def tokenizer_json(self, prefix_ids: Sequence[int], suffix_ids: Sequence[int]) -> str:
        """The file that `from_tokenizer_json` and transformers read; the ids are put around every text."""
        library = LibraryTokenizer.from_str(self._library.to_str())
        prefix, suffix = ([library.id_to_token(i) for i in ids] for ids in (prefix_ids, suffix_ids))
        library.decoder = ByteLevelDecoder()
        if prefix or suffix:
            around = list(zip([*prefix, *suffix], [*prefix_ids, *suffix_ids], strict=True))
            single = [*prefix, "$A", *suffix]
            pair = [*single, *(f"{token}:1" for token in prefix), "$B:1", *(f"{token}:1" for token in suffix)]
            library.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=around)
        return str(library.to_str(pretty=True))


def from_tokenizer_json(path: Path) -> tuple[BpeVocabulary, list[int], list[int]]:
    """The vocabulary, and the ids that the file's post-processor puts before and after a text.

    Raises TokenizerError for a file that the library cannot read or whose decoder is not one of the two that
    language models of today use.
    """
    try:
        library = LibraryTokenizer.from_file(str(path))
        stored = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"{path} cannot be read: {error}", "download the tokenizer again") from error
    library.no_padding()
    library.no_truncation()
    decoders = _flat(stored.get("decoder"), "decoders")
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        vocabulary = BpeVocabulary(library, byte_level=True)
    elif kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = any(
            decoder["type"] == "Strip" or decoder.get("prepend_scheme", "never") != "never" for decoder in decoders
        )
        vocabulary = BpeVocabulary(library, byte_level=False, strips_leading_space=strips)
    else:
        raise TokenizerError(
            f"{path} has the decoder {', '.join(sorted(kinds)) or 'none'}",
            "take a model whose tokenizer is byte-level BPE or sentencepiece",
        )
    return vocabulary, *_around(library)


def _flat(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [part for child in node[key] for part in _flat(child, key)] if node["type"] == "Sequence" else [node]


def _around(library: LibraryTokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor adds, found by letting it work on a letter."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise TokenizerError("the post-processor of tokenizer.json changes the text's own ids")


def from_gguf_parts(
    tokens: list[str], merges: list[str], token_types: list[int], pre_tokenizer: str, unknown: str | None
) -> BpeVocabulary:
    """Byte-level BPE of `tokenizer.ggml.model = gpt2`. Raises TokenizerError for an unknown `tokenizer.ggml.pre`.

    unknown: the token for bytes that the vocabulary lacks (SmolLM2 has no 06 and no F1), as transformers
    does; llama.cpp and the library drop such a byte
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"the GGUF file's pre-tokenizer {pre_tokenizer!r} is not known", "take one of " + ", ".join(PRE_TOKENIZERS)
        )
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)  # padding tokens may repeat a text; the first one is what text becomes
    try:
        pairs = [_pair(merge) for merge in merges]
        # Llama 3 takes a word that is a token as it is, even where no merges lead to it
        model = BPE(
            ids, pairs, unk_token=unknown, fuse_unk=True, ignore_merges=PRE_TOKENIZERS[pre_tokenizer] == (LLAMA3,)
        )
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"the merges of the GGUF file are broken: {error}", "download it again") from error
    library = LibraryTokenizer(model)
    splits = [Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre_tokenizer]]
    library.pre_tokenizer = PreTokenizers([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    library.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return BpeVocabulary(library, byte_level=True)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
