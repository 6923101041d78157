"""transformers' `generate` as the one to be measured against: the same process, the same weights, greedy.

Knows no engine of ours; it is given a checkpoint or a shape.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lmtool.bench.workloads import Prompt
from lmtool.checkpoint.formats import open_checkpoint
from lmtool.checkpoint.llava_config import architecture_of
from lmtool.checkpoint.reader import read_json
from lmtool.errors import ConfigError
from lmtool.models.config import ModelConfig


class _Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Asked after each token whether to stop: never, but it remembers when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TransformersPeer:
    """A model of transformers in one dtype on one device. ``name`` is that of the dtype."""

    def __init__(self, source: Path | ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ConfigError where transformers cannot build it without a checkpoint's own code."""
        self.name = str(dtype).removeprefix("torch.")
        model = _random(source, dtype, device) if isinstance(source, ModelConfig) else _stored(source, dtype)
        self._model = model.eval().to(device)
        self._device = device

    def step_times(self, prompts: Sequence[Prompt], num_new_tokens: int) -> tuple[float, list[float]]:
        """Equally long prompts → seconds to their first tokens, and of each later step."""
        ids = torch.tensor(prompts, device=self._device)
        clock = _Clock()
        settings = transformers.GenerationConfig(
            max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )
        started = time.perf_counter()
        with torch.inference_mode():
            answer = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        assert answer.shape[1] == ids.shape[1] + num_new_tokens, "end-of-sequence is ignored"
        laps = [b - a for a, b in zip([started, *clock.times], clock.times, strict=False)]
        return laps[0], laps[1:]


def _stored(path: Path, dtype: torch.dtype) -> Any:
    """From a folder as transformers loads it; from a GGUF, and of a LLaVA the language model, with the tensors that our
    own reader dequantizes."""
    if path.is_dir() and not _takes_pictures(path):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"--against transformers: it cannot load {path} ({' '.join(str(error).split())[:160]})",
                "compare by --shape, or with a model that needs no code of its own",
            ) from None
        return _without_defaults(model)
    checkpoint = open_checkpoint(path)
    try:
        model = _empty(checkpoint.config, dtype)
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    finally:
        checkpoint.close()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing  # tied: the embedding is in its place
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def _takes_pictures(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and architecture_of(read_json(config)) is not None


def _random(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    with device:  # billions of random numbers take a CPU minutes
        model = _empty(hf_config(shape), dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.02)
    return model


def _empty(config: dict[str, Any], dtype: torch.dtype) -> Any:
    values = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    settings = transformers.AutoConfig.for_model(config["model_type"], **values)
    return _without_defaults(transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype))


def _without_defaults(model: Any) -> Any:
    """No end of sequence and no sampling default of the checkpoint may enter."""
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def hf_config(shape: ModelConfig) -> dict[str, Any]:
    """A config.json for a shape: Qwen2 where q, k and v have biases, else Llama (InternLM2 differs in names only)."""
    return {
        "model_type": "qwen2" if shape.qkv_bias else "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "rope_theta": shape.rope.theta,
    }
