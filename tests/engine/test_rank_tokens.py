"""Greedy tokens of several ranks are those of one: a real model in float32, half precision by docs/design.md's rule."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lmtool import GenerationConfig, pipeline
from lmtool.config import EngineConfig
from lmtool.engine.core import EngineCore
from tests.engine.test_ranks import ON_CARDS, PROMPTS, engine, two_cards
from tests.quant.models import tiny_folder
from tests.support import NEAR_TIE, request, run_all

NUM_NEW = 10


def test_a_real_model_in_three_parts() -> None:
    """SmolLM2 has 9 heads, and 3 of keys and values."""
    prompts = ["The capital of France is", "def fibonacci(n):"]
    asked = GenerationConfig(max_new_tokens=8, temperature=0.0)
    settings: dict[str, Any] = {"dtype": "float32", "session_len": 256, "device": "cpu", "cache_gb": 0.05}
    answers = []
    for tp in (1, 3):
        with pipeline("smollm2-135m", EngineConfig(tp=tp, **settings)) as pipe:
            answers.append([answer.token_ids for answer in pipe(prompts, asked)])
    assert answers[0] == answers[1]
    assert [len(answer) for answer in answers[0]] == [8, 8]


def test_half_precision(tmp_path: Path) -> None:
    settings = {"dtype": "bfloat16"}
    check_half_precision(tiny_folder(tmp_path, "Qwen3ForCausalLM"), settings)


@pytest.mark.gpu
@two_cards
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM", "Qwen3ForCausalLM"])
def test_half_precision_on_two_cards(tmp_path: Path, architecture: str, dtype: str) -> None:
    check_half_precision(tiny_folder(tmp_path, architecture), {**ON_CARDS, "dtype": dtype})


def check_half_precision(folder: Path, settings: dict[str, Any]) -> None:
    """Both are fed the same tokens; they agree wherever the two largest logits are further apart than a near tie."""
    alone = engine(folder, **settings)
    answers, gaps = greedy(alone.core)
    alone.core.close()
    steps = [(i, k) for i in PROMPTS for k in range(NUM_NEW)]
    asked = [request(NUM_NEW * i + k, [*PROMPTS[i], *answers[i][:k]], max_new_tokens=1) for i, k in steps]
    together = engine(folder, tp=2, **settings)
    try:
        found = run_all(together.core, asked)
    finally:
        together.core.close()
    clear = [(i, k) for i, k in steps if gaps[i][k] >= NEAR_TIE[getattr(torch, settings["dtype"])]]
    assert len(clear) >= 0.6 * len(steps)
    assert [found[NUM_NEW * i + k] for i, k in clear] == [[answers[i][k]] for i, k in clear]


def greedy(core: EngineCore) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """What each is answered, and how far the two likeliest were apart each time."""
    for i, ids in PROMPTS.items():
        core.add(request(i, ids, max_new_tokens=NUM_NEW, logprobs=2))
    answers: dict[int, list[int]] = {i: [] for i in PROMPTS}
    gaps: dict[int, list[float]] = {i: [] for i in PROMPTS}
    while core.has_work:
        for output in core.step():
            assert output.token_id is not None
            assert output.logprob is not None
            answers[output.request_id].append(output.token_id)
            (_, first), (_, second) = output.logprob.top[:2]
            gaps[output.request_id].append(first - second)
    return answers, gaps
