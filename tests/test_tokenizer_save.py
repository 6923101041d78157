"""A tokenizer saved beside a model is the same tokenizer: for lmtool and for transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lmtool.checkpoint.hub import resolve_model
from lmtool.errors import TokenizerError
from lmtool.tokenizer import load_tokenizer
from lmtool.tokenizer.save import save_tokenizer
from tests.test_tokenizer import write_bpe_gguf
from tests.test_tokenizer_libraries import internlm
from tests.tokenizer_files import TEXTS, folder_with

MESSAGES = [{"role": "user", "content": "Hi <|im_end|> there"}]


def test_smollm2_out_of_a_gguf(tmp_path: Path) -> None:
    source = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(source)
    save_tokenizer(tokenizer, source, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    again, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        if text:  # theirs reads special tokens inside a text, ours only on request
            assert theirs.encode(text) == tokenizer.encode(text, parse_special=True)
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.chat_ids(MESSAGES) == tokenizer.chat_ids(MESSAGES)
    assert again.eos_ids == tokenizer.eos_ids
    assert again.bos_id == tokenizer.bos_id
    plain = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(plain, add_generation_prompt=True)["input_ids"] == tokenizer.chat_ids(plain)


def test_a_gguf_that_adds_bos(tmp_path: Path) -> None:
    source = write_bpe_gguf(tmp_path / "m.gguf", "llama-bpe")
    tokenizer = load_tokenizer(source)
    folder = folder_with(tmp_path / "saved", {"config.json": {}})
    save_tokenizer(tokenizer, source, folder)
    again = load_tokenizer(folder)
    assert again.encode("a 1") == tokenizer.encode("a 1")
    assert again.prefix_ids == tokenizer.prefix_ids


def test_a_folder_s_own_files_are_copied(tmp_path: Path) -> None:
    source = internlm(tmp_path / "source")
    (source / "tokenization_internlm.py").write_text("raise SystemExit")
    folder = tmp_path / "saved"
    folder.mkdir()
    names = save_tokenizer(load_tokenizer(source), source, folder)
    assert "tokenizer.model" in names
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not list(folder.glob("*.py"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        save_tokenizer(tokenizer, tmp_path, tmp_path / "out")
