"""Sentencepiece and tiktoken models: InternLM, Qwen 1 and Llama-like GGUF files, against the libraries themselves."""

import base64
import io
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from lmtool.engine.detokenizer import Detokenizer
from lmtool.errors import TokenizerError
from lmtool.tokenizer import load_tokenizer
from tests.tokenizer_files import SENTENCES, TEXTS, folder_with

# ------------------------------------------------------------------ sentencepiece


def train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    defaults: dict[str, Any] = {"model_type": "bpe", "vocab_size": 360, "byte_fallback": True}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        minloglevel=2,
        **(defaults | {"hard_vocab_limit": False} | options),
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_sentencepiece()


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_of_a_gguf_is_the_library_s(tmp_path: Path, add_space: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(train_sentencepiece(add_dummy_prefix=add_space))
    size = processor.get_piece_size()
    kinds = [
        (processor.is_unknown, 2),
        (processor.is_control, 3),
        (processor.is_byte, 6),
    ]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)])
    writer.add_token_types([next((kind for test, kind in kinds if test(i)), 1) for i in range(size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(add_space)
    writer.add_tensor("token_embd.weight", np.zeros((size, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    for text in (*TEXTS, *SENTENCES[:4]):
        if "\x00" in text:
            continue  # the library takes a NUL for the end
        ids = tokenizer.encode(text)
        assert ids == [1, *processor.encode(text)]
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.eos_ids == {2}
    assert tokenizer.encode("</s>", add_special=False, parse_special=True) == [2]


def internlm(path: Path) -> Path:
    model = train_sentencepiece(user_defined_symbols="<eoh>,<eoa>")
    files = {
        "tokenizer.model": model,
        "config.json": {"architectures": ["InternLMForCausalLM"], "eos_token_id": 2},
        "tokenizer_config.json": {"tokenizer_class": "InternLMTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}},
    }
    return folder_with(path, files)


def test_internlm(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(internlm(tmp_path))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = tokenizer.encode("the answer is there")
    assert ids == [1, *processor.encode("the answer is there")]
    assert tokenizer.token_text(ids[1]).startswith(" ")
    assert tokenizer.decode(ids) == "the answer is there"
    eoa = processor.piece_to_id("<eoa>")
    assert tokenizer.eos_ids == {2, eoa}
    messages = [{"role": "user", "content": "the fox"}]
    assert tokenizer.render_chat(messages) == "<s><|User|>:the fox<eoh>\n<|Bot|>:"
    chat = tokenizer.chat_ids(messages)
    assert chat[0] == 1
    assert chat.count(1) == 1  # one BOS
    assert chat[1:] == processor.encode("<|User|>:the fox<eoh>\n<|Bot|>:")
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == "the answer is there"


def test_internlm2_names_its_unused_pieces(tmp_path: Path, sentencepiece_model: bytes) -> None:
    added = {str(i): {"content": text, "special": True} for i, text in ((340, "<|im_end|>"), (341, "<|im_start|>"))}
    files = {
        "tokenizer.model": sentencepiece_model,
        "tokenizer.json": {"never": "read"},
        "config.json": {"architectures": ["InternLM2ForCausalLM"], "eos_token_id": 2},
        "generation_config.json": {"eos_token_id": [2, 340]},
        "tokenizer_config.json": {"added_tokens_decoder": added, "add_bos_token": True},
        "added_tokens.json": {"<pad>": 5000},
    }
    tokenizer = load_tokenizer(folder_with(tmp_path, files))
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    ids = tokenizer.chat_ids([{"role": "user", "content": "the fox"}])
    assert ids == [
        *(1, 341, *processor.encode("user\nthe fox"), 340, *processor.encode("\n")),
        *(341, *processor.encode("assistant\n")),
    ]
    assert tokenizer.eos_ids == {2, 340}
    assert tokenizer.encode("<pad>", add_special=False, parse_special=True) == [5000]
    assert tokenizer.vocab_size == 5001
    assert tokenizer.decode(ids) == " user\nthe fox \n assistant\n".removeprefix(" ")


# ------------------------------------------------------------------ tiktoken


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many ranks as Qwen 1 has, so that its special tokens get their real ids."""
    tokens = [bytes((i,)) for i in range(256)] + [b"th", b"the", b" t", b" th", b" the", "é".encode()]
    tokens += [b"\xff\xfe" + str(i).encode() for i in range(151643 - len(tokens))]
    lines = b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    files = {"qwen.tiktoken": lines, "config.json": {"architectures": ["QWenLMHeadModel"]}}
    chatml = {"generation_config.json": {"chat_format": "chatml", "eos_token_id": 151643}}
    return folder_with(tmp_path_factory.mktemp("qwen"), files | chatml)


def test_qwen_1(qwen: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    assert tokenizer.token_id("<|endoftext|>") == 151643
    assert tokenizer.token_id("<|im_start|>") == 151644
    assert tokenizer.token_id("<|extra_0|>") == 151646
    assert tokenizer.vocab_size == 151643 + 208
    assert tokenizer.eos_ids == {151643, 151645}
    assert tokenizer.bos_id is None
    the, space_the = tokenizer.token_id("the"), tokenizer.token_id(" the")
    assert tokenizer.encode("the the") == [the, space_the]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") == [tokenizer.token_id("é")]
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [151645]
    assert 151645 not in tokenizer.encode("<|im_end|>")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode([10**6]) == ""


def test_qwen_1_base_has_no_template(qwen: Path, tmp_path: Path) -> None:
    files = {"qwen.tiktoken": (qwen / "qwen.tiktoken").read_bytes(), "generation_config.json": {"chat_format": "raw"}}
    files |= {"config.json": {"architectures": ["QWenLMHeadModel"]}}
    assert load_tokenizer(folder_with(tmp_path, files)).chat_template is None


@pytest.mark.parametrize("data", [b"not base64 at all", b"YQ== 0\nYg== 5", b"", b"YQ== x"])
def test_a_broken_tiktoken_file_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(TokenizerError, match="qwen.tiktoken"):
        load_tokenizer(folder_with(tmp_path, {"qwen.tiktoken": data}))
