"""A tokenizer in the words of a GGUF file: the inverse of what `load` reads there.

Source: the keys `tokenizer.ggml.*` of ggml's docs/gguf.md. Does not know models' weights.
"""

from dataclasses import dataclass, field
from typing import Any

from lmtool.errors import TokenizerError
from lmtool.tokenizer.bpe import CONTROL, GPT2, PRE_TOKENIZERS, USER_DEFINED, BpeVocabulary
from lmtool.tokenizer.sentencepiece_model import SentencePieceVocabulary
from lmtool.tokenizer.tokenizer import Tokenizer

_NORMAL, _UNUSED = 1, 5


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """model 'gpt2' (byte-level BPE with merges, cut as ``pre`` says) or 'llama' (sentencepiece with scores)."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str | None = None
    add_space_prefix: bool | None = None


def for_gguf(tokenizer: Tokenizer, vocab_size: int) -> GgufTokenizer:
    """vocab_size: of the model, whose last rows may belong to no token. Raises TokenizerError for what GGUF lacks."""
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, BpeVocabulary):
        return _byte_level(vocabulary, vocab_size, tokenizer.source)
    if isinstance(vocabulary, SentencePieceVocabulary):
        return _sentencepiece(vocabulary, vocab_size)
    raise TokenizerError(f"the tokenizer of {tokenizer.source} is a tiktoken file", "GGUF has no form for its merges")


def _byte_level(vocabulary: BpeVocabulary, vocab_size: int, source: str) -> GgufTokenizer:
    stored = vocabulary.as_json()
    if not vocabulary.is_byte_level or stored["model"]["type"] != "BPE":
        raise TokenizerError(
            f"the tokenizer.json of {source} is not byte-level BPE", "put its tokenizer.model beside it"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, i in stored["model"]["vocab"].items():
        if i < vocab_size:
            tokens[i], types[i] = token, _NORMAL
    for added in stored["added_tokens"]:
        if added["id"] < vocab_size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    return GgufTokenizer("gpt2", tokens, types, merges=merges, pre=_pre_tokenizer(stored["pre_tokenizer"], source))


def _pre_tokenizer(stored: dict[str, Any], source: str) -> str:
    """llama.cpp's name for how text is cut before BPE."""
    patterns = tuple(_patterns(stored))
    # 'llama3' and 'llama-bpe' are one; the first name in the table that fits is llama.cpp's own
    for name, known in PRE_TOKENIZERS.items():
        if patterns == known:
            return name
    raise TokenizerError(
        f"the tokenizer of {source} cuts text in a way that GGUF has no name for here",
        "known are " + ", ".join(PRE_TOKENIZERS),
    )


def _patterns(node: dict[str, Any] | None) -> list[str]:
    if node is None:
        return []
    kind = node["type"]
    if kind == "Sequence":
        return [pattern for child in node["pretokenizers"] for pattern in _patterns(child)]
    if kind == "Split":
        return [node["pattern"].get("Regex", "")]
    if kind == "Digits":
        return [r"\p{N}"] if node["individual_digits"] else ["digits"]
    if kind == "ByteLevel":
        return [GPT2] if node["use_regex"] else []
    return [kind]


def _sentencepiece(vocabulary: SentencePieceVocabulary, vocab_size: int) -> GgufTokenizer:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types, scores = [_UNUSED] * vocab_size, [0.0] * vocab_size
    for i, (piece, score, kind) in enumerate(vocabulary.pieces()):
        if i < vocab_size:
            tokens[i], scores[i], types[i] = piece, score, kind
    for text, i in vocabulary.added.items():
        if i < vocab_size:
            tokens[i], types[i] = text, CONTROL
    return GgufTokenizer("llama", tokens, types, scores=scores, add_space_prefix=vocabulary.strips_leading_space)
