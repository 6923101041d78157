"""From a checkpoint to its `Tokenizer`: which file holds it, which ids end an answer, which template it speaks.

Does not know how any of the files is read.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lmtool.checkpoint.gguf_file import GgufFile
from lmtool.checkpoint.manifest import MANIFEST, workspace_of
from lmtool.errors import TokenizerError
from lmtool.images import llava_config
from lmtool.json_file import json_object
from lmtool.tokenizer import bpe, chat_template, sentencepiece_model, tiktoken_model
from lmtool.tokenizer.tokenizer import Tokenizer
from lmtool.tokenizer.vocabulary import Vocabulary

# tokens that end a turn in the templates of our models
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<eoa>", "<|end|>")
# their remote tokenizers are sentencepiece; a converted tokenizer.json gives other ids
SENTENCEPIECE_ARCHITECTURES = ("InternLMForCausalLM", "InternLM2ForCausalLM")
IMAGE_TOKENS = dict.fromkeys((*llava_config.OF_TRANSFORMERS, *llava_config.ORIGINALS), "<image>")
_json = partial(json_object, refusal=TokenizerError)


def load_tokenizer(path: Path, *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or a .gguf file.

    chat_template: NAME of a built-in or of one of the checkpoint's own, or a .jinja or .json FILE.
    Raises CheckpointError for a file of another kind, TokenizerError when files are missing or broken or the name is
    unknown. A model without a template loads; `render_chat` refuses then.
    """
    path = workspace_of(path)
    if path.is_file() and path.suffix != ".gguf":
        from lmtool.checkpoint.formats import open_checkpoint  # brings torch

        open_checkpoint(path)  # refuses every such file, and says what to do with each kind
    return _from_gguf(path, chat_template) if path.suffix == ".gguf" else _from_folder(path, chat_template)


# ------------------------------------------------------------------ a folder of HF files


def _from_folder(folder: Path, template_choice: str | None) -> Tokenizer:
    workspace = _json(folder / MANIFEST)
    config = workspace.get("config") or _json(folder / "config.json")
    generation = workspace.get("generation_config") or _json(folder / "generation_config.json")
    settings = _json(folder / "tokenizer_config.json")
    architecture = next(iter(config.get("architectures") or ()), None)
    vocabulary, prefix, suffix = _folder_vocabulary(folder, architecture, settings)
    tokens = _special_texts(_json(folder / "special_tokens_map.json") | settings)
    if isinstance(vocabulary, sentencepiece_model.SentencePieceVocabulary):
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | tokens
    bos_id = vocabulary.token_id(tokens["bos_token"]) if "bos_token" in tokens else None
    if bos_id is not None and _adds(settings, "add_bos_token", vocabulary) and prefix[:1] != [bos_id]:
        prefix = [bos_id, *prefix]
    own = _own_templates(folder, settings, architecture in IMAGE_TOKENS) | _templates_of(workspace)
    is_base = generation.get("chat_format") == "raw"  # how Qwen 1 says it
    fallback = None if is_base else _spoken_as(architecture, vocabulary)
    template = _template(own, folder, template_choice, fallback)
    eos_text = tokens.get("eos_token")
    return Tokenizer(
        vocabulary=vocabulary,
        bos_id=bos_id,
        eos_ids=_eos_ids(
            vocabulary,
            template,
            generation.get("eos_token_id"),
            config.get("eos_token_id"),
            (config.get("text_config") or {}).get("eos_token_id"),
            vocabulary.token_id(eos_text) if eos_text else None,
        ),
        prefix_ids=tuple(prefix),
        suffix_ids=tuple(suffix),
        tokens=tokens,
        template=template,
        image_token=IMAGE_TOKENS.get(architecture or ""),
        source=str(folder),
    )


def _folder_vocabulary(
    folder: Path, architecture: str | None, settings: Mapping[str, Any]
) -> tuple[Vocabulary, list[int], list[int]]:
    """The vocabulary, and the ids that its own file puts before and after a text."""
    tiktoken_files = sorted(folder.glob("*.tiktoken"))
    if tiktoken_files:
        return tiktoken_model.from_tiktoken_file(tiktoken_files[0]), [], []
    model, library = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.exists() and (architecture in SENTENCEPIECE_ARCHITECTURES or not library.exists()):
        added = sentencepiece_model.added_tokens(settings, _json(folder / "added_tokens.json"))
        is_legacy = settings.get("legacy") is not False
        return sentencepiece_model.from_model_file(model, added, is_legacy=is_legacy), [], []
    if library.exists():
        return bpe.from_tokenizer_json(library)
    if not any((folder / name).exists() for name in ("config.json", MANIFEST)):
        raise TokenizerError(f"{folder} holds no model", "give a folder with config.json, or a .gguf file")
    raise TokenizerError(
        f"{folder} holds no tokenizer.json, tokenizer.model or *.tiktoken", "download the tokenizer's files into it"
    )


def _adds(settings: Mapping[str, Any], key: str, vocabulary: Vocabulary) -> bool:
    """Whether BOS goes before a text although tokenizer.json does not say so.

    Llama's tokenizer class reads it from tokenizer_config.json; a bare sentencepiece model's class does by default.
    """
    if isinstance(vocabulary, sentencepiece_model.SentencePieceVocabulary):
        return bool(settings.get(key, True))
    return "Llama" in str(settings.get("tokenizer_class")) and settings.get(key) is True


def _special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[key] = text
    return texts


def _own_templates(folder: Path, settings: Mapping[str, Any], takes_images: bool) -> dict[str, str]:
    """name -> Jinja. A file of its own goes before tokenizer_config.json, as in transformers.

    takes_images: what the processor of texts and pictures has goes before what its tokenizer has.
    """
    templates: dict[str, str] = {}
    of_tokenizer = settings.get("chat_template")
    of_processor = _json(folder / "chat_template.json").get("chat_template")
    if takes_images:
        of_processor = of_processor or _json(folder / "processor_config.json").get("chat_template")
    stored = of_processor or of_tokenizer if takes_images else of_tokenizer or of_processor
    if isinstance(stored, str):
        templates["default"] = stored
    elif isinstance(stored, list):
        templates |= {entry["name"]: entry["template"] for entry in stored}
    file = folder / "chat_template.jinja"
    if file.exists():
        templates["default"] = file.read_text(encoding="utf-8")
    return templates


def _templates_of(workspace: Mapping[str, Any]) -> dict[str, str]:
    template = workspace.get("chat_template")
    return {"default": template} if isinstance(template, str) else {}


def _spoken_as(architecture: str | None, vocabulary: Vocabulary) -> str | None:
    """The built-in template of a model whose files have none."""
    name = chat_template.BY_ARCHITECTURE.get(architecture or "")
    # LLaVA 1.6 34B: Vicuna's architecture around a Yi that was taught ChatML
    return "llava-chatml" if name == "llava" and vocabulary.token_id("<|im_start|>") is not None else name


def _template(
    own: Mapping[str, str], source: Path, choice: str | None, fallback: str | None
) -> chat_template.ChatTemplate | None:
    if choice is not None:
        return chat_template.chosen(choice, own)
    return chat_template.by_default(own, str(source), fallback)


def _eos_ids(
    vocabulary: Vocabulary,
    template: chat_template.ChatTemplate | None,
    *stored: int | Iterable[int] | None,
) -> frozenset[int]:
    found: set[int] = set()
    for value in stored:
        if value is not None:
            found |= {value} if isinstance(value, int) else set(value)
    for text in END_OF_TURN:
        token_id = vocabulary.token_id(text)
        if template is not None and text in template.source and token_id is not None:
            found.add(token_id)
    return frozenset(found)


# ------------------------------------------------------------------ a GGUF file


def _from_gguf(path: Path, template_choice: str | None) -> Tokenizer:
    file = GgufFile(path)

    def stored(key: str) -> Any:
        return file.metadata.get(f"tokenizer.{key}")

    vocabulary, is_sentencepiece = _gguf_vocabulary(file)
    bos_id, eos_id = stored("ggml.bos_token_id"), stored("ggml.eos_token_id")
    starts_llama3 = stored("ggml.pre") in ("llama-bpe", "llama3")
    add_bos = _default(stored("ggml.add_bos_token"), is_sentencepiece or starts_llama3)
    add_eos = _default(stored("ggml.add_eos_token"), False)
    own = {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.chat_template") and isinstance(value, str)
    }
    template = _template(own, path, template_choice, None)
    names = {"bos_token": bos_id, "eos_token": eos_id, "unk_token": stored("ggml.unknown_token_id")}
    return Tokenizer(
        vocabulary=vocabulary,
        bos_id=bos_id,
        eos_ids=_eos_ids(vocabulary, template, eos_id, stored("ggml.eot_token_id"), stored("ggml.eom_token_id")),
        prefix_ids=(bos_id,) if add_bos and bos_id is not None else (),
        suffix_ids=(eos_id,) if add_eos and eos_id is not None else (),
        tokens={name: vocabulary.token_bytes(i).decode() for name, i in names.items() if i is not None},
        template=template,
        source=str(path),
    )


def _default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _gguf_vocabulary(file: GgufFile) -> tuple[Vocabulary, bool]:
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or not file.has_strings("tokenizer.ggml.tokens"):
        raise TokenizerError(
            f"{file.path} holds the tokenizer {kind!r}", "take a file with tokenizer.ggml.model gpt2 or llama"
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    types = _numbers(file, "token_type", tokens, default=1)
    if kind == "llama":
        scores = _numbers(file, "scores", tokens, default=0.0)
        add_space = _default(file.metadata.get("tokenizer.ggml.add_space_prefix"), True)
        return sentencepiece_model.from_gguf_parts(tokens, scores, types, add_space, file.path), True
    if not file.has_strings("tokenizer.ggml.merges"):
        raise TokenizerError(f"{file.path} lacks tokenizer.ggml.merges", "convert it again with llama.cpp's converter")
    merges = file.strings("tokenizer.ggml.merges")
    pre_tokenizer = file.metadata.get("tokenizer.ggml.pre", "default")
    unknown_id = file.metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown_id is not None and unknown_id >= len(tokens):
        raise TokenizerError(f"{file.path}: unknown_token_id is {unknown_id} of {len(tokens)}", "download it again")
    unknown = None if unknown_id is None else tokens[unknown_id]
    return bpe.from_gguf_parts(tokens, merges, types, pre_tokenizer, unknown), False


def _numbers(file: GgufFile, key: str, tokens: list[str], default: float) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return [default] * len(tokens)
    if len(values) != len(tokens):
        raise TokenizerError(
            f"{file.path} holds {len(tokens)} tokens and {len(values)} of tokenizer.ggml.{key}", "download it again"
        )
    numbers: list[Any] = values.tolist()
    return numbers
