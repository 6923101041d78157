"""The sentencepiece library: a folder's tokenizer.model, or the same out of a GGUF.

Does not know chat templates or which ids end an answer.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtool.errors import TokenizerError
from lmtool.tokenizer.vocabulary import sentencepiece_bytes, split_special

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# sentencepiece's piece types, which tokenizer.ggml.token_type copies
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
PIECE_TYPES = (UNKNOWN, CONTROL, UNUSED, BYTE)


class SentencePieceVocabulary:
    """`Vocabulary` over a sentencepiece model, with tokens of the checkpoint's configuration on top.

    added: text -> id of tokens that the configuration adds or renames (InternLM2's <|im_end|> is an unused piece)
    within: encodes what stands behind a special token in the midst of a text, where that gets no leading space
    """

    def __init__(
        self,
        processor: "SentencePieceProcessor",
        added: dict[str, int],
        adds_leading_space: bool,
        within: "SentencePieceProcessor | None" = None,
    ) -> None:
        self._processor = processor
        self._within = within or processor
        self._bos = processor.id_to_piece(processor.bos_id()) if processor.bos_id() >= 0 else None
        self._num_pieces = processor.get_piece_size()
        control = {processor.id_to_piece(i): i for i in range(self._num_pieces) if processor.is_control(i)}
        self.added = added
        self._special = control | added
        self._added_bytes = {token_id: text.encode() for text, token_id in added.items()}
        self.special = frozenset(self._special.values())
        self.size = max(self._num_pieces, *(token_id + 1 for token_id in added.values()), 0)
        self.strips_leading_space = adds_leading_space

    def encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return list(self._processor.encode(text))
        if self._bos is not None and text.startswith(self._bos):  # what follows is still the beginning
            return [self._special[self._bos], *self.encode(text.removeprefix(self._bos), parse_special)]
        return split_special(text, self._special, self._processor.encode, self._within.encode)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        if not 0 <= token_id < self._num_pieces:
            return b""
        if self._processor.is_unknown(token_id):
            return " ⁇ ".encode()  # as the library itself decodes it
        piece = self._processor.id_to_piece(token_id)
        return piece.encode() if self._processor.is_control(token_id) else sentencepiece_bytes(piece)

    def token_id(self, text: str) -> int | None:
        if text in self._special:
            return self._special[text]
        token_id = self._processor.piece_to_id(text)
        return None if self._processor.is_unknown(token_id) else token_id

    def pieces(self) -> Iterator[tuple[str, float, int]]:
        """Text, score and type of each piece, as sentencepiece_model.proto numbers the types."""
        model = self._processor
        tests = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
        for i in range(self._num_pieces):
            kind = next((kind for kind, test in zip(PIECE_TYPES, tests, strict=True) if test(i)), NORMAL)
            yield model.id_to_piece(i), model.get_score(i), kind

    def model_file(self) -> bytes:
        """The bytes of a tokenizer.model."""
        return bytes(self._processor.serialized_model_proto())


def added_tokens(tokenizer_config: Mapping[str, Any], added_tokens_json: Mapping[str, int]) -> dict[str, int]:
    """text -> id of what tokenizer_config.json's `added_tokens_decoder` and added_tokens.json add."""
    entries = tokenizer_config.get("added_tokens_decoder") or {}
    return dict(added_tokens_json) | {entry["content"]: int(token_id) for token_id, entry in entries.items()}


def from_model_file(path: Path, added: dict[str, int], *, is_legacy: bool = True) -> SentencePieceVocabulary:
    """is_legacy: a leading space is put before each stretch between special tokens, not only before the first, as
    transformers' LlamaTokenizer does unless ``legacy`` is false.

    Raises TokenizerError for a file that is no sentencepiece model.
    """
    model = path.read_bytes()
    processor = _processor(model, path)
    # of a message that is there twice in a file of this kind, the last one's fields count: add_dummy_prefix is false
    within = None if is_legacy else _processor(model + _message(3, _integer(3, False)), path)
    return SentencePieceVocabulary(processor, added, _adds_leading_space(processor), within)


def from_gguf_parts(
    tokens: list[str], scores: list[float], token_types: list[int], add_space_prefix: bool, source: Path
) -> SentencePieceVocabulary:
    """The vocabulary of `tokenizer.ggml.model = llama`: BPE by scores, bytes where no piece fits."""
    model = _model_proto(tokens, scores, token_types, add_space_prefix)
    return SentencePieceVocabulary(_processor(model, source), {}, add_space_prefix)


def _processor(model: bytes, source: Path) -> "SentencePieceProcessor":
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise TokenizerError(
            f"the tokenizer of {source} needs the package sentencepiece",
            "pip install '.[tokenizers]' in lmtool's folder",
        ) from error
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{source} holds no sentencepiece model: {reason}", "download it again") from error
    return processor


def _adds_leading_space(processor: "SentencePieceProcessor") -> bool:
    pieces = processor.encode("a", out_type=str)
    return bool(pieces) and pieces[0].startswith("▁")


# ------------------------------------------------------------------ sentencepiece_model.proto, written by hand


def _model_proto(tokens: list[str], scores: list[float], token_types: list[int], add_space_prefix: bool) -> bytes:
    """A serialized ModelProto. Field numbers are those of sentencepiece's sentencepiece_model.proto.

    Written by hand because it is five fields and the protobuf package is not needed for anything else.
    """
    pieces = (
        _message(1, _message(1, token.encode()) + _float(2, score) + _integer(3, kind))
        for token, score, kind in zip(tokens, scores, token_types, strict=True)
    )
    bpe = 2
    unknown_id = token_types.index(UNKNOWN) if UNKNOWN in token_types else 0
    trainer = _integer(3, bpe) + _integer(35, BYTE in token_types) + _integer(40, unknown_id)
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _integer(3, add_space_prefix) + _integer(4, False) + _integer(5, True)
    return b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data
