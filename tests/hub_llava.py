"""LLaVA folders with the very files that lie on the hub: their config.json, tokenizer and processor files key by key.

Only the numbers that make a model large are smaller; vocabulary, tiles and grids are those of the real ones.
"""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from tests.checkpoint.llava_forms import in_form
from tests.hub_llava_files import (
    CLIP,
    CONFIGS,
    GRIDS,
    IMAGE_TOKEN_ID,
    INSTRUCT_TEMPLATE,
    MISTRAL_TEMPLATE,
    PICTURES,
    PICTURES_1_6,
    VICUNA_TEMPLATE,
    VISION,
)
from tests.tokenizer_files import SENTENCES, folder_with

SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL_TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 8}
SMALL_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def is_original(name: str) -> bool:
    return name.startswith("liuhaotian/")


def hub_llava(name: str, folder: Path) -> Any:
    """Fill ``folder`` as ``name`` lies on the hub, small; returns transformers' model of the same weights (float32).

    The tower of liuhaotian's 1.5 lies beside it, as `openai/clip-…` was downloaded.
    """
    config = small(CONFIGS[name])
    model = _model(config)
    folder_with(folder, {"config.json": config, **_tokenizer_files(name), **_processor_files(name)})
    form = "original" if is_original(name) else "hub"
    named = {in_form(key, form): value.contiguous() for key, value in model.state_dict().items()}
    if is_original(name):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            named[key] = named[key][: config["vocab_size"]].clone()
    if name == "liuhaotian/llava-v1.5-7b":
        beginning = "model.vision_tower.vision_tower."
        tower = {key.removeprefix(beginning): named.pop(key) for key in list(named) if key.startswith(beginning)}
        beside = folder.parent / CLIP.rpartition("/")[2]
        vision = VISION | SMALL_VISION
        folder_with(beside, {"config.json": {"architectures": ["CLIPModel"], "vision_config": vision}})
        folder_with(beside, {"preprocessor_config.json": PICTURES | {"crop_size": 336, "size": 336}})
        save_file(tower, beside / "model.safetensors")
    save_file(named, folder / "model.safetensors")
    return model


def small(config: dict[str, Any]) -> dict[str, Any]:
    """With the sizes of a tiny model, and all else as it is."""
    if "vision_config" in config:
        tables = {"text_config": config["text_config"] | SMALL_TEXT, "vision_config": VISION | SMALL_VISION}
        return config | tables | {"torch_dtype": "float32"}
    made = config | SMALL_TEXT | {"mm_hidden_size": SMALL_VISION["hidden_size"], "torch_dtype": "float32"}
    if config["image_aspect_ratio"] == "anyres":  # its tower is in the checkpoint, and is not of the size of its name
        made["vision_config"] = VISION | SMALL_VISION
    return made


def _model(config: dict[str, Any]) -> Any:
    import transformers as hf

    text = config.get("text_config") or {
        "model_type": config["model_type"].replace("llava_", "").replace("llava", "llama"),
        **{key: config[key] for key in (*SMALL_TEXT, "rms_norm_eps", "max_position_embeddings")},
        "vocab_size": config["vocab_size"] + 1,  # transformers' model needs a token for pictures
        "rope_theta": config.get("rope_theta", 10000.0),
        "sliding_window": config.get("sliding_window"),
    }
    is_next = bool(config.get("image_grid_pinpoints"))
    given = {"text_config": text, "vision_config": VISION | SMALL_VISION, "image_token_index": IMAGE_TOKEN_ID}
    torch.manual_seed(0)
    if is_next:
        whole = hf.LlavaNextConfig(image_grid_pinpoints=GRIDS, **given)
        model: Any = hf.LlavaNextForConditionalGeneration(whole)
    else:
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**given))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.12)
            elif "norm" not in key:
                weight.normal_(0, 0.05)
    return model.float().eval()


def llama_pieces() -> bytes:
    """A tokenizer.model as Llama's: <unk>, <s>, </s>, 256 bytes, and 32000 pieces in all, most of which no text has."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=made,
        minloglevel=2,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(made.getvalue())
    for i in range(len(proto.pieces), 32000):
        proto.pieces.add(piece=f"{chr(0xE000 + i % 4096)}{chr(0xF0000 + i)}", score=-1e6 - i, type=1)
    return proto.SerializeToString()


def _added(text: str, *, normalized: bool = False) -> dict[str, Any]:
    sides = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": text, "normalized": normalized, **sides}


def _tokenizer_files(name: str) -> dict[str, Any]:
    pieces = llama_pieces()
    base = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    base |= {"legacy": "mistral" in name, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"}
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    generation |= {"transformers_version": "4.36.2"}
    if is_original(name):
        special = {key: {"__type": "AddedToken", **_added(text)} for key, text in _TEXTS_OF.items()}
        settings = base | special | {"model_max_length": 2048, "pad_token": None, "padding_side": "right"}
        if "mistral" in name:
            decoder = {str(i): _added(text) | {"special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))}
            settings |= {"added_tokens_decoder": decoder, "chat_template": INSTRUCT_TEMPLATE}
        shown = {key: _added(text) for key, text in _TEXTS_OF.items()} | {"pad_token": "<unk>"}
        files = {"tokenizer_config.json": settings, "special_tokens_map.json": shown}
        return files | {"tokenizer.model": pieces, "generation_config.json": generation}
    added = ("<unk>", "<s>", "</s>"), (("<image>", 32000), ("<pad>", 32001))
    decoder = {str(i): _added(text) | {"special": True} for i, text in enumerate(added[0])}
    decoder |= {str(i): _added(text) | {"special": True} for text, i in added[1]}
    settings = base | _TEXTS_OF | {"added_tokens_decoder": decoder, "add_prefix_space": None}
    settings |= {"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>", "pad_token": "<pad>"}
    settings |= {"model_max_length": 1000000000000000019884624838656, "padding_side": "left"}
    settings |= {"processor_class": _processor_class(name), "trust_remote_code": False}
    settings |= {"use_default_system_prompt": False}
    return {
        "tokenizer_config.json": settings,
        "tokenizer.model": pieces,
        "tokenizer.json": _fast(pieces).encode(),
        "added_tokens.json": dict(added[1]),
        "special_tokens_map.json": {**_TEXTS_OF, "image_token": "<image>", "pad_token": _added("<pad>")},
        "generation_config.json": generation | {"pad_token_id": 32001},
    }


_TEXTS_OF = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _fast(pieces: bytes) -> str:
    """tokenizer.json as transformers 4 made it of Llama's tokenizer.model, with what llava-hf added."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    known = sorted(
        (piece for piece, i in vocab.items() if i >= 259 and processor.get_score(i) > -1e6),
        key=lambda piece: vocab[piece],
    )
    merges = []
    for piece in known:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    added = [{"id": i, **_added(t), "special": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    added += [{"id": i, **_added(t), "special": True} for t, i in (("<image>", 32000), ("<pad>", 32001))]
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    begin,
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "<s>", "type_id": 1}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": [f"{left} {right}" for left, right in merges],
            },
        }
    )


def _processor_class(name: str) -> str:
    return "LlavaNextProcessor" if "1.6" in name else "LlavaProcessor"


def _processor_files(name: str) -> dict[str, Any]:
    if is_original(name):
        return {}
    said = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14}
    said |= {"processor_class": _processor_class(name), "vision_feature_select_strategy": "default"}
    template = MISTRAL_TEMPLATE if "mistral" in name else VICUNA_TEMPLATE
    return {
        "preprocessor_config.json": PICTURES_1_6 if "1.6" in name else PICTURES,
        "processor_config.json": said,
        "chat_template.json": {"chat_template": template},
    }
