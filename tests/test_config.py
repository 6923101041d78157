"""What a user may set is checked where it is set: the engine's thread never meets a value of a wrong type."""

from typing import Any

import numpy as np
import pytest

from lmtool.config import EngineConfig, GenerationConfig
from lmtool.errors import ConfigError, RequestError


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("session_len", "5", "a whole number or None"),
        ("session_len", 5.5, "a whole number or None"),
        ("session_len", True, "a whole number or None"),
        ("max_batch_size", None, "a whole number"),
        ("device", 3, "a text"),
        ("prefix_caching", "no", "True or False"),
        ("cache_gb", "much", "a number or None"),
        ("cache_gb", float("inf"), "a size in GiB above 0"),
        ("model_format", "onnx", "one of hf, awq, gptq, gguf, lmtool"),
    ],
)
def test_an_engine_s_setting_is_refused_by_name(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{name: value})
    assert str(caught.value) == f"--{name.replace('_', '-')} is {value!r}; give {wanted}"


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", None, "a number"),
        ("temperature", "hot", "a number"),
        ("top_k", 1.5, "a whole number"),
        ("max_new_tokens", 1.5, "a whole number or None"),
        ("seed", 1.5, "a whole number or None"),
        ("logprobs", True, "a whole number or None"),
        ("ignore_eos", "no", "True or False"),
        ("stop", 5, "a list of texts"),
        ("stop_token_ids", 5, "a list of whole numbers"),
        ("logit_bias", {"a": 1.0}, "a mapping of token ids to numbers"),
        ("logit_bias", {5: "much"}, "a mapping of token ids to numbers"),
    ],
)
def test_a_request_s_setting_is_refused_by_name(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(RequestError) as caught:
        GenerationConfig(**{name: value})
    assert str(caught.value) == f"--{name.replace('_', '-')} is {value!r}; give {wanted}"


def test_an_item_of_a_wrong_type_is_refused_with_its_list() -> None:
    with pytest.raises(RequestError, match="--bad-words is \\(3,\\); give a list of texts"):
        GenerationConfig(bad_words=[3])  # type: ignore[arg-type]


def test_lists_whole_numbers_for_numbers_and_numpy_s_numbers_are_taken() -> None:
    config: Any = GenerationConfig
    taken = config(temperature=1, top_k=np.int64(3), top_p=np.float32(0.5), stop="end", stop_token_ids=[1, 2])
    assert (taken.temperature, taken.top_k, taken.stop, taken.stop_token_ids) == (1, 3, ("end",), (1, 2))
