"""The LLaVAs of the hub, file for file but for their sizes: each loads, prompts and answers as its original does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlamaTokenizer

from lmtool import EngineConfig, GenerationConfig, pipeline
from lmtool.checkpoint.llava_config import language_config, stated_tower
from lmtool.images.form import read_image_form
from lmtool.images.prepared import IMAGE_ID
from lmtool.models.loader import read_model_config
from lmtool.tokenizer import load_tokenizer
from tests.hub_llava import hub_llava, is_original, llama_pieces
from tests.hub_llava_files import CONFIGS, IMAGE_TOKEN_ID
from tests.models.test_llava import expected_logits, picture
from tests.support import check_greedy
from tests.tokenizer_files import folder_with

NEW = 6
Hub = Callable[[str], tuple[Path, Any]]
SHOWN = picture((300, 80))  # so long that two of its kind fit into 4096 tokens
ASKED = [{"type": "image", "image": SHOWN}, {"type": "text", "text": "the quick fox: what is there?"}]
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": ASKED}]
MORE: list[dict[str, Any]] = [
    *MESSAGES,
    {"role": "assistant", "content": [{"type": "text", "text": "a lazy dog"}]},
    {"role": "user", "content": [{"type": "image", "image": SHOWN}, {"type": "text", "text": "and the other one?"}]},
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """A name of the hub → its folder, and transformers' model of the same weights; each is made once."""

    @cache
    def made(name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("hub") / name
        return folder, hub_llava(name, folder)

    return made


def places(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "image"} if part["type"] == "image" else part for part in parts]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_real_config_says_a_model_of_the_real_size(name: str) -> None:
    language = read_model_config(language_config(CONFIGS[name]))
    kv_heads, inner = (8, 14336) if "mistral" in name else (32, 11008)
    assert (language.num_layers, language.hidden_size, language.num_heads, language.head_dim) == (32, 4096, 32, 128)
    assert (language.num_kv_heads, language.intermediate_size, language.sliding_window) == (kv_heads, inner, 0)
    assert language.vocab_size == (32000 if is_original(name) else 32064)
    assert language.rope.theta == (1e6 if "mistral" in name else 1e4)
    assert (language.tie_word_embeddings, language.rms_norm_eps) == (False, 1e-5)
    tower = stated_tower(CONFIGS[name])
    assert tower is not None
    assert (tower["num_hidden_layers"], tower["hidden_size"], tower["image_size"]) == (24, 1024, 336)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_answers_as_transformers_model_of_the_same_weights(name: str, hub: Hub) -> None:
    folder, model = hub(name)
    with pipeline(folder, EngineConfig(dtype="float32", device="cpu", cache_gb=0.2)) as pipe:
        ids, images = pipe.prepare(MORE)
        answer = pipe(MORE, GenerationConfig(temperature=0, max_new_tokens=NEW, ignore_eos=True)).token_ids
        assert pipe.tokenizer.eos_ids == {2}
        assert [image.num_tokens for image in images] == [576 if "1.5" in name else 1164] * 2
    ids = [min(i, IMAGE_TOKEN_ID) for i in ids]
    with torch.inference_mode():
        logits = expected_logits(model, [*ids, *answer], images)[-NEW - 1 : -1]
    assert check_greedy(answer, logits) >= NEW - 1


@pytest.mark.parametrize("name", [name for name in CONFIGS if not is_original(name)])
@pytest.mark.parametrize("messages", [MESSAGES, MORE], ids=["one turn", "two turns"])
def test_the_prompt_is_the_processor_s(name: str, messages: list[dict[str, Any]], hub: Hub) -> None:
    folder, _ = hub(name)
    theirs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    form = read_image_form(folder)
    assert form is not None
    ids = load_tokenizer(folder).chat_ids([{**m, "content": places(m["content"])} for m in messages])
    rows = [form.prepare(SHOWN).num_tokens] * ids.count(IMAGE_ID)
    assert [j for i in ids for j in ([IMAGE_TOKEN_ID] * rows.pop(0) if i == IMAGE_ID else [i])] == theirs


@pytest.mark.parametrize("name", [name for name in CONFIGS if is_original(name)])
def test_the_prompt_is_llava_s_own(name: str, hub: Hub) -> None:
    """As `tokenizer_image_token` makes it: pieces around pictures, each a text of its own, and BOS once."""
    folder, _ = hub(name)
    words = LlamaTokenizer.from_pretrained(folder)
    first, second = "\nthe quick fox: what is there?", "\nand the other one?"
    if "mistral" in name:
        prompt = f"[INST] <image>{first} [/INST]a lazy dog</s>[INST] <image>{second} [/INST]"
    else:
        prompt = (
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions. "
            f"USER: <image>{first} ASSISTANT: a lazy dog</s>USER: <image>{second} ASSISTANT:"
        )
    expected = [1]
    for piece in prompt.split("<image>"):
        expected += [*words(piece)["input_ids"][1:], IMAGE_ID]
    assert load_tokenizer(folder).chat_ids([{**m, "content": places(m["content"])} for m in MORE]) == expected[:-1]


@pytest.mark.parametrize("legacy", [True, False])
def test_behind_the_end_of_a_turn_is_a_space_only_in_older_tokenizers(legacy: bool, tmp_path: Path) -> None:
    """``legacy`` of tokenizer_config.json, as transformers 4 reads it with a tokenizer.model."""
    files = {"tokenizer.model": llama_pieces(), "tokenizer_config.json": {"legacy": legacy}, "config.json": {}}
    tokenizer = load_tokenizer(folder_with(tmp_path, files))
    space = tokenizer.token_id("▁")
    for text, num_spaces in (("<s>why</s>why", 1 + legacy), ("why</s></s>why", 1 + legacy), ("</s>why", legacy)):
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert ids.count(space) == num_spaces
        assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == text
