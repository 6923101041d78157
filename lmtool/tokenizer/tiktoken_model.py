"""The tiktoken library: Qwen 1's qwen.tiktoken, without its remote code.

Source of the pattern and of the special tokens: tokenization_qwen.py of Qwen/Qwen-7B-Chat.
"""

import base64
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from lmtool.errors import TokenizerError

if TYPE_CHECKING:
    from tiktoken import Encoding

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class TiktokenVocabulary:
    """`Vocabulary` over a tiktoken file; special tokens take the ids after its last rank."""

    strips_leading_space = False

    def __init__(self, encoding: "Encoding", special: dict[str, int]) -> None:
        self._encoding = encoding
        self._special = special
        self.special = frozenset(special.values())
        self.size = encoding.n_vocab

    def encode(self, text: str, parse_special: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text)  # as Qwen's own tokenizer does
        if parse_special:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        return self._encoding.encode_ordinary(text)

    def token_bytes(self, token_id: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except KeyError:
            return b""

    def token_id(self, text: str) -> int | None:
        if text in self._special:
            return self._special[text]
        try:
            return self._encoding.encode_single_token(text)
        except KeyError:
            return None


def from_tiktoken_file(path: Path) -> TiktokenVocabulary:
    """Lines of base64 and rank. Raises TokenizerError for anything else."""
    try:
        from tiktoken import Encoding
    except ImportError as error:
        raise TokenizerError(
            f"the tokenizer of {path} needs the package tiktoken", "pip install '.[tokenizers]' in lmtool's folder"
        ) from error
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as error:
        raise TokenizerError(f"{path} is not a tiktoken file: {error}", "download it again") from error
    if not ranks or set(ranks.values()) != set(range(len(ranks))):
        raise TokenizerError(f"{path} is cut off: its {len(ranks)} ranks have gaps", "download it again")
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    encoding = Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return TiktokenVocabulary(encoding, special)
