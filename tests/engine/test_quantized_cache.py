"""A quantized K/V cache in the engine: what fits, what is refused, and answers that depend on nothing else."""

from dataclasses import replace

import pytest
import torch

from lmtool.config import EngineConfig
from lmtool.engine.kv_cache import block_bytes, plan_cache
from lmtool.errors import ConfigError, MemoryShortError
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder
from tests.engine.test_device_runner import Late, device_core
from tests.support import TINY, all_logits, check_equal, request, run_all, tiny_core, tiny_decoder

GENERATOR = torch.Generator().manual_seed(9)
LENGTHS = (5, 63, 64, 130)
PROMPTS = {i: torch.randint(0, 211, (n,), generator=GENERATOR).tolist() for i, n in enumerate(LENGTHS)}
PROMPTS[4] = [*PROMPTS[3], 3, 4]  # a returning turn: blocks of another are taken over
REQUESTS = [request(i, prompt, max_new_tokens=70) for i, prompt in PROMPTS.items()]
SCHEMES = ("int8", "k8v4", "int4")
CPU = torch.device("cpu")
LLAMA_3 = replace(TINY, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, max_positions=8192)
LLAMA_2 = replace(LLAMA_3, num_kv_heads=32)
SMALL_HEADS = replace(LLAMA_3, num_heads=9, num_kv_heads=3, head_dim=64)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[str, dict[int, list[int]]]:
    def one_by_one(kv_dtype: str) -> dict[int, list[int]]:
        cores = ((r, tiny_core(decoder, prefix_caching=False, kv_dtype=kv_dtype)) for r in REQUESTS)
        return {r.request_id: run_all(core, [r])[r.request_id] for r, core in cores}

    return {kv_dtype: one_by_one(kv_dtype) for kv_dtype in SCHEMES}


@pytest.mark.parametrize("kv_dtype", SCHEMES)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_batched_tokens": 64}, id="chunked"),
        pytest.param({"num_blocks": 8, "session_len": 220}, id="preempted"),
        pytest.param({"max_batch_size": 2}, id="queued"),
    ],
)
def test_answers_are_those_of_a_request_alone(settings, kv_dtype, decoder, alone) -> None:  # noqa: ANN001
    core = tiny_core(decoder, kv_dtype=kv_dtype, **settings)
    for _ in range(2):  # then over what the first run left behind
        check_equal(alone[kv_dtype], run_all(core, REQUESTS), decoder, PROMPTS, kv_dtype)
    assert bool(core.scheduler.counters.num_preemptions) == ("num_blocks" in settings)
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("kv_dtype", SCHEMES)
@pytest.mark.parametrize("settings", [{}, {"padded": 1, "budget": 100}, {"num_blocks": 8, "session_len": 220}])
def test_answers_are_those_of_the_plain_path(settings, kv_dtype, decoder, alone) -> None:  # noqa: ANN001
    core = device_core(decoder, Late, kv_dtype=kv_dtype, **settings)
    for _ in range(2):
        check_equal(alone[kv_dtype], run_all(core, REQUESTS), decoder, PROMPTS, kv_dtype)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 2e-3), ("k8v4", 3e-2), ("int4", 3e-2)])
def test_logits_lose_little_and_are_those_of_any_chunking(kv_dtype: str, bound: float, decoder: Decoder) -> None:
    ids = [*PROMPTS[3], *PROMPTS[2]]
    exact = torch.log_softmax(all_logits(decoder, ids), -1)
    found = [all_logits(decoder, ids, chunk, kv_dtype) for chunk in (len(ids), 1, 70)]
    lost = (exact.exp() * (exact - torch.log_softmax(found[0], -1))).sum(-1)
    assert 0 < float(lost.mean()) < bound
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=2e-3)


def test_a_full_block_of_int4_is_shared_and_a_partly_filled_one_is_not(decoder: Decoder) -> None:
    core = tiny_core(decoder, kv_dtype="int4")
    run_all(core, [request(0, PROMPTS[3], max_new_tokens=4)])
    assert run_all(core, [request(1, [*PROMPTS[3], 5], max_new_tokens=4)])[1]
    assert core.scheduler.counters.num_cached_tokens == 128
    core = tiny_core(decoder, kv_dtype="int8")
    run_all(core, [request(0, PROMPTS[3], max_new_tokens=4)])
    run_all(core, [request(1, [*PROMPTS[3], 5], max_new_tokens=4)])
    assert core.scheduler.counters.num_cached_tokens == 130


# ---------------------------------------------------------------------- what fits
@pytest.mark.parametrize("model", [LLAMA_3, LLAMA_2, SMALL_HEADS], ids=["llama 3", "llama 2", "heads of 64"])
@pytest.mark.parametrize(("kv_dtype", "at_least"), [("int8", 1.85), ("k8v4", 2.4), ("int4", 3.1)])
def test_tokens_in_the_same_bytes_open_blocks_included(kv_dtype: str, at_least: float, model: ModelConfig) -> None:
    size = 45 if model.num_kv_heads > 3 else 10  # more is of no use to 256 sessions

    def tokens(**settings: object) -> int:
        config = EngineConfig(cache_gb=size, session_len=8192, **settings)  # type: ignore[arg-type]
        plan = plan_cache(config, model, torch.float16, CPU, 80 << 30)
        assert (size - 1) << 30 < plan.num_bytes <= size << 30
        return plan.num_blocks - 1

    assert tokens(kv_dtype=kv_dtype) >= at_least * tokens()


def test_the_plan_s_bytes_are_those_of_the_tensors(decoder: Decoder) -> None:
    from lmtool.engine.kv_cache import allocate_cache

    for kv_dtype in ("model", *SCHEMES):
        config = EngineConfig(kv_dtype=kv_dtype, cache_gb=0.01, max_batch_size=3)
        plan = plan_cache(config, decoder.config, torch.float32, CPU, 1 << 30)
        held = 0
        for store in allocate_cache(plan, decoder.config, torch.float32, CPU):
            parts = store.tensors() + (store.opened[:4] if kv_dtype == "int4" else ())  # type: ignore[attr-defined]
            held += sum(part.nbytes for part in parts)
        assert held == plan.num_bytes


def test_auto_takes_int8_where_numbers_are_too_many(caplog: pytest.LogCaptureFixture) -> None:
    def plan(cache_gb: float, kv_dtype: str | None = "auto"):  # noqa: ANN202
        config = EngineConfig(cache_gb=cache_gb, session_len=512, kv_dtype=kv_dtype, max_batch_size=1)
        return plan_cache(config, TINY, torch.float32, CPU, 8 << 30)

    whole = 9 * block_bytes(TINY, torch.float32) / (1 << 30)
    assert plan(whole).scheme is None
    assert plan(0.6 * whole).scheme == "int8"
    with pytest.raises(MemoryShortError, match=r"one session of 512 tokens .*--kv-dtype int8, which takes half"):
        plan(0.6 * whole, None)
    with pytest.raises(MemoryShortError, match=r"raise --cache-gb$"):
        plan(0.1 * whole)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_policy": 3}, r"--quant-policy is 3; give 0 \(off\), 8 \(int8\) or 4 \(int4\)"),
        ({"kv_dtype": "fp8"}, r"--kv-dtype is 'fp8'; give one of model, auto, int8, int4, k8v4, static"),
        ({"kv_dtype": "int4", "quant_policy": 8}, r"--kv-dtype is 'int4'; give int8, which is --quant-policy 8"),
        ({"quant_policy": "8"}, r"--quant-policy is '8'; give a whole number"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_the_two_names_are_one() -> None:
    assert EngineConfig(quant_policy=8).kv_choice == EngineConfig(kv_dtype="int8").kv_choice == "int8"
    assert EngineConfig(quant_policy=4, kv_dtype="int4").kv_choice == "int4"
    assert EngineConfig().kv_choice == "model"
    assert EngineConfig(quant_policy=0).under({"kv_dtype": "int8"}).kv_choice == "model"
    assert EngineConfig(kv_dtype="k8v4").under({"quant_policy": 8}).kv_choice == "k8v4"
    assert EngineConfig(session_len=9).under({"quant_policy": 8}).kv_choice == "int8"
