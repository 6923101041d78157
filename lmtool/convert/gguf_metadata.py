"""What a GGUF file says of a model and its tokenizer. Source: the keys of ggml's docs/gguf.md."""

from typing import TYPE_CHECKING, Any

import numpy as np

from lmtool.checkpoint.gguf_config import llama3_divisors
from lmtool.errors import CheckpointError, TokenizerError
from lmtool.models.config import ModelConfig
from lmtool.tokenizer import Tokenizer
from lmtool.tokenizer.gguf import GgufTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# llama.cpp's architecture of each of ours: Qwen 1 is a Qwen 2 under other names, InternLM a Llama with biases
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "InternLMForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "QWenLMHeadModel": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def add_model(writer: "GGUFWriter", model: ModelConfig, kind: str) -> None:
    """Raises CheckpointError for a rotary scaling that GGUF has no form for."""
    from gguf import LlamaFileType, RopeScalingType

    files = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1"}
    writer.add_file_type(LlamaFileType[files[kind]])
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_vocab_size(model.vocab_size)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_dimension_count(model.rope.dim)
    writer.add_rope_freq_base(model.rope.theta)
    if model.sliding_window:
        writer.add_sliding_window(model.sliding_window)
    if model.rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope.factor)
    elif model.rope.kind not in ("default", "llama3"):
        raise CheckpointError(f"GGUF has no form for rope scaling {model.rope.kind!r}", "`--to hf` has")


def rope_freqs(model: ModelConfig) -> np.ndarray[Any, Any] | None:
    """Llama 3.1's table of divisors, which GGUF has in place of four settings."""
    rope = model.rope
    if rope.kind != "llama3":
        return None
    scaling = {
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    return llama3_divisors(scaling, rope.theta, rope.dim).astype(np.float32)


def add_tokenizer(writer: "GGUFWriter", stored: GgufTokenizer, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model(stored.model)
    writer.add_token_list(stored.tokens)
    writer.add_token_types(stored.types)
    if stored.pre is not None:
        writer.add_tokenizer_pre(stored.pre)
        writer.add_token_merges(stored.merges)
    else:
        writer.add_token_scores(stored.scores)
    if stored.add_space_prefix is not None:
        writer.add_add_space_prefix(stored.add_space_prefix)
    ids = {name: tokenizer.vocabulary.token_id(text) for name, text in tokenizer.tokens.items()}
    if len(tokenizer.prefix_ids) > 1 or tokenizer.suffix_ids not in ((), (ids.get("eos_token"),)):
        raise TokenizerError(
            f"the tokenizer of {tokenizer.source} puts {len(tokenizer.prefix_ids)} tokens before a text and "
            f"{len(tokenizer.suffix_ids)} behind it",
            "GGUF can say BOS before it and EOS behind it, nothing else",
        )
    writer.add_add_bos_token(bool(tokenizer.prefix_ids))
    writer.add_add_eos_token(bool(tokenizer.suffix_ids))
    bos = tokenizer.prefix_ids[0] if tokenizer.prefix_ids else tokenizer.bos_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    if ids.get("unk_token") is not None:
        writer.add_unk_token_id(ids["unk_token"])
    if ids.get("pad_token") is not None:
        writer.add_pad_token_id(ids["pad_token"])
    eos = ids.get("eos_token") if ids.get("eos_token") is not None else min(tokenizer.eos_ids, default=None)
    if eos is not None:
        writer.add_eos_token_id(eos)
        others = sorted(tokenizer.eos_ids - {eos})
        if others:
            writer.add_eot_token_id(others[0])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
