"""Pictures through the whole engine, with a tiny LLaVA: batched, chunked, shared, beside text, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.executor import LocalExecutor
from lmtool.engine.kv_cache import plan_cache
from lmtool.engine.requests import place_images
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.sequence import Request
from lmtool.engine.setup import build_core, load_engine
from lmtool.errors import EngineError
from lmtool.images.form import ImageForm
from lmtool.images.prepared import IMAGE_ID, PreparedImage
from lmtool.models.decoder import Decoder
from tests.models.test_llava import SIZES, expected_logits, load, picture
from tests.support import check_greedy, collect, run_all, tiny_decoder
from tests.tiny_llava import tiny_llava

NEW = 8
Prompt = Sequence[int | PreparedImage]
Llava = tuple[Path, Any, Decoder, ImageForm]  # transformers' model and ours


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    folder = tmp_path_factory.mktemp("llava")
    model = tiny_llava(folder)
    return folder, model, *load(folder)


def request(request_id: int, prompt: Prompt, **settings: Any) -> Request:
    images = [one for one in prompt if isinstance(one, PreparedImage)]
    ids, placed = place_images([IMAGE_ID if isinstance(one, PreparedImage) else one for one in prompt], images)
    settings = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": NEW, **settings}
    return Request(
        request_id=request_id,
        prompt_ids=tuple(ids),
        params=GenerationConfig(**settings),
        stop_ids=frozenset(),
        seed=0,
        images=placed,
    )


@pytest.fixture(scope="module")
def prompts(llava: Llava) -> dict[int, Prompt]:
    """Texts and pictures: 0, 1, 2 and 5 of them."""
    form = llava[3]
    shown = [form.prepare(picture(size, seed)) for seed, size in enumerate(SIZES)]
    return {
        0: [5, 6, 7, 8],
        1: [5, shown[0], 9, 10],
        2: [5, shown[1], 9, shown[4], 11, 12],
        3: [5, 6, *shown[:5], 13],
        4: [shown[3], 14] * 3,
        5: list(range(100, 180)),
    }


@pytest.fixture(scope="module")
def alone(llava: Llava, prompts: dict[int, Prompt]) -> dict[int, list[int]]:
    """Each by itself; and that is what transformers makes of it."""
    _, model, decoder, _ = llava
    answers = {}
    for i, prompt in prompts.items():
        answers |= run_all(core_of(decoder), [request(i, prompt)])
    compared = 0
    for i in (1, 2, 3, 4):
        images = [one for one in prompts[i] if isinstance(one, PreparedImage)]
        ids = [IMAGE_ID if isinstance(one, PreparedImage) else one for one in prompts[i]]
        with torch.inference_mode():
            logits = expected_logits(model, [*ids, *answers[i]], images)
        compared += check_greedy(answers[i], logits[-NEW - 1 : -1])
    assert compared >= 0.9 * 4 * NEW
    return answers


def core_of(decoder: Decoder, *, runner: type | None = None, **settings: Any) -> EngineCore:
    settings = {"max_batch_size": 8, "cache_gb": 0.05, **settings}
    if runner is None:
        return build_core(decoder, EngineConfig(**settings))[0]
    config = EngineConfig(**settings)
    plan = plan_cache(config, decoder.config, decoder.dtype, decoder.device, 1 << 30)
    blocks = BlockManager(plan.num_blocks, plan.block_size, keep_tails=plan.keeps_tails)
    scheduler = Scheduler(blocks, max_batch_size=8, max_batched_tokens=512, max_image_tiles=4)
    executor = LocalExecutor(runner(decoder, plan, max_batch_size=8))
    return EngineCore(scheduler, executor, session_len=plan.session_len)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batched_tokens": 64},
        {"max_image_tiles": 1},
        {"max_batched_tokens": 64, "max_image_tiles": 1, "prefix_caching": False},
        {"max_batch_size": 2},
        {"runner": DeviceRunner},
    ],
    ids=lambda settings: ",".join(settings) or "together",
)
def test_mixed_requests_are_each_as_alone(
    llava: Llava,
    prompts: dict[int, Prompt],
    alone: dict[int, list[int]],
    settings: dict[str, Any],
) -> None:
    core = core_of(llava[2], **settings)
    assert run_all(core, [request(i, prompt) for i, prompt in prompts.items()]) == alone
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks - 1


def test_two_ranks_answer_as_one(llava: Llava, prompts: dict[int, Prompt], alone: dict[int, list[int]]) -> None:
    """Each of them encodes every picture."""
    settings = {"dtype": "float32", "device": "cpu", "cache_gb": 0.05, "max_batch_size": 8}
    core = load_engine(llava[0], EngineConfig(tp=2, **settings)).core
    try:
        assert run_all(core, [request(i, prompt) for i, prompt in prompts.items()]) == alone
    finally:
        core.close()


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_over_a_quantized_cache_an_answer_is_the_same_in_any_company(
    llava: Llava, prompts: dict[int, Prompt], kv_dtype: str
) -> None:
    together = run_all(
        core_of(llava[2], kv_dtype=kv_dtype, max_batched_tokens=64), [request(i, p) for i, p in prompts.items()]
    )
    for i, prompt in prompts.items():
        assert run_all(core_of(llava[2], kv_dtype=kv_dtype), [request(i, prompt)])[i] == together[i]


def test_the_same_picture_again_is_neither_encoded_nor_computed(llava: Llava, prompts: dict[int, Prompt]) -> None:
    _, _, decoder, form = llava
    assert decoder.vision is not None
    encoded: list[int] = []
    tower = decoder.vision

    class Counting:
        num_bytes = tower.num_bytes

        def encode(self, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
            encoded.append(len(images))
            return tower.encode(images)

    core = core_of(decoder)
    shown = form.prepare(picture((56, 56)))
    decoder.vision = Counting()
    try:
        run_all(core, [request(0, [5, 6, shown, 7, 8, 9])])
        before = core.scheduler.counters.num_cached_tokens
        again = run_all(core, [request(1, [5, 6, shown, 20, 21])])[1]
        assert core.scheduler.counters.num_cached_tokens - before == 2 + shown.num_tokens
        assert encoded == [1]
        other = form.prepare(picture((56, 56), seed=9))
        run_all(core, [request(2, [5, 6, other, 20, 21])])
        assert core.scheduler.counters.num_cached_tokens - before == 2 + shown.num_tokens  # but for 5, 6: too few
        assert encoded == [1, 1]
    finally:
        decoder.vision = tower
    assert again == run_all(core_of(decoder), [request(1, [5, 6, shown, 20, 21])])[1]


def test_one_picture_of_two_requests_is_encoded_once_in_a_step(
    llava: Llava, alone: dict[int, list[int]], prompts: dict[int, Prompt]
) -> None:
    core = core_of(llava[2], prefix_caching=False, max_image_tiles=64)
    answers = run_all(core, [request(1, prompts[1]), request(7, prompts[1])])
    assert answers == {1: alone[1], 7: alone[1]}


def test_penalties_and_logprobs_beside_pictures(llava: Llava, prompts: dict[int, Prompt]) -> None:
    core = core_of(llava[2])
    answers = run_all(core, [request(1, prompts[1], repetition_penalty=1.3, logprobs=3, presence_penalty=0.5)])
    assert len(answers[1]) == NEW


def test_a_picture_for_a_model_without_a_tower_ends_that_request_alone(
    llava: Llava, prompts: dict[int, Prompt]
) -> None:
    core = core_of(tiny_decoder(), max_batch_size=1)
    core.add(request(0, [1, 2, 3]))
    core.add(request(1, prompts[1]))
    core.add(request(2, [4, 5, 6]))
    errors, answers = {}, {0: [], 2: []}
    while core.has_work:
        outputs = core.step()
        errors |= {output.request_id: output.error for output in outputs if output.error is not None}
        collect([output for output in outputs if output.error is None], answers)
    assert list(errors) == [1]
    assert isinstance(errors[1], EngineError)
    assert "takes no pictures" in str(errors[1])
    assert [len(answers[i]) for i in (0, 2)] == [NEW, NEW]


def test_load_engine_brings_the_tower(llava: Llava, prompts: dict[int, Prompt], alone: dict[int, list[int]]) -> None:
    loaded = load_engine(llava[0], EngineConfig(dtype="float32", device="cpu", cache_gb=0.05))
    assert loaded.takes_images
    assert run_all(loaded.core, [request(2, prompts[2])])[2] == alone[2]
    loaded.core.close()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"max_batched_tokens": 64}, {"kv_dtype": "int8"}], ids=str)
def test_on_a_gpu_answers_are_transformers(llava: Llava, prompts: dict[int, Prompt], settings: dict[str, Any]) -> None:
    """With graphs for what has no picture: twice, so that the second time beginnings are found and copied."""
    given = {"dtype": "float32", "device": "cuda", "cache_gb": 0.5, "max_batch_size": 8, "session_len": 512}
    core = load_engine(llava[0], EngineConfig(**given, **settings)).core
    near = bool(settings.get("kv_dtype"))
    compared = 0
    for first in (0, 10):
        answers = run_all(core, [request(first + i, [*prompt, 21 + first]) for i, prompt in prompts.items()])
        for i in (1, 2, 3, 4):
            prompt = [*prompts[i], 21 + first]
            images = [one for one in prompt if isinstance(one, PreparedImage)]
            ids = [IMAGE_ID if isinstance(one, PreparedImage) else one for one in prompt]
            with torch.inference_mode():
                logits = expected_logits(llava[1], [*ids, *answers[first + i]], images)[-NEW - 1 : -1]
            compared += check_greedy(answers[first + i], logits, torch.float16 if near else torch.float32)
    assert compared >= (0.5 if near else 0.9) * 8 * NEW
    assert core.scheduler.counters.num_cached_tokens > 0
    core.close()
