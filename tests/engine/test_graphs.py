"""The engine on a GPU, with graphs and without: the CPU's answers, whatever shares a step and whenever it is read."""

import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lmtool import kernels
from lmtool.config import EngineConfig
from lmtool.engine.core import EngineCore
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.kv_cache import block_bytes
from lmtool.engine.setup import build_core
from lmtool.errors import MemoryShortError
from lmtool.models.decoder import Decoder
from lmtool.models.random import random_decoder
from tests.engine.test_device_runner import PROMPTS, REQUESTS, SAMPLED, SPECIAL, overflows
from tests.support import NEAR_TIE, TINY, all_logits, check_equal, request, run_all, tiny_core, tiny_decoder

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> dict[int, list[int]]:
    return {r.request_id: run_all(tiny_core(decoder, prefix_caching=False), [r])[r.request_id] for r in REQUESTS}


def gpu_decoder(dtype: torch.dtype = torch.float32, **difference: int) -> Decoder:
    """The tiny decoder's weights on the GPU; one of ``difference`` has weights of its own."""
    config = replace(TINY, **difference)  # type: ignore[arg-type]
    made = random_decoder(config, dtype=torch.float32, device=torch.device("cpu"), num_positions=512)
    move = torch.device("cuda")

    def moved(value: object) -> object:
        return value.to(move, dtype) if isinstance(value, torch.Tensor) else value

    for layer in made.layers:
        for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
            setattr(layer, name, moved(getattr(layer, name)))
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            matrix.weight = moved(matrix.weight)  # type: ignore[attr-defined]
    made.head.weight = moved(made.head.weight)  # type: ignore[attr-defined]
    made.embed, made.final_norm = moved(made.embed), moved(made.final_norm)  # type: ignore[assignment]
    made.cos_sin = made.cos_sin.to(move)
    return made


def gpu_core(decoder: Decoder, **settings: object) -> EngineCore:
    given = {"max_batch_size": 8, "session_len": 320, "cache_gb": 1.0, "max_batched_tokens": 512, **settings}
    return build_core(decoder, EngineConfig(**given))[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def on_gpu() -> Decoder:
    return gpu_decoder()


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"prefix_caching": False}, {"max_batched_tokens": 64}, {"max_batch_size": 3}],
    ids=str,
)
def test_answers_are_the_cpus(cuda_graphs, settings, decoder, alone, on_gpu) -> None:  # noqa: ANN001
    core = gpu_core(on_gpu, cuda_graphs=cuda_graphs, **settings)
    check_equal(alone, run_all(core, REQUESTS), decoder, PROMPTS)
    check_equal(alone, run_all(core, REQUESTS), decoder, PROMPTS)
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("kv_dtype", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"max_batched_tokens": 64}], ids=str)
def test_answers_over_a_quantized_cache_are_the_cpus(settings, dtype, kv_dtype, decoder) -> None:  # noqa: ANN001
    """float16 goes through the kernel without conversions, float32 through the general ones. A rounding apart, a code
    may be its neighbour: near ties are half precision's in both."""
    core = gpu_core(gpu_decoder(dtype), kv_dtype=kv_dtype, **settings)
    for _ in range(2):  # then over the blocks that the first run left behind
        compared = total = 0
        for i, answer in run_all(core, REQUESTS).items():
            logits = all_logits(decoder, [*PROMPTS[i], *answer], kv_dtype=kv_dtype)[len(PROMPTS[i]) - 1 : -1]
            top = torch.topk(logits, 2)
            sure = top.values[:, 0] - top.values[:, 1] > NEAR_TIE[torch.float16]  # both were fed the answer's tokens
            assert torch.equal(top.indices[sure, 0], torch.tensor(answer)[sure])
            compared, total = compared + int(sure.sum()), total + len(answer)
        assert compared >= 0.5 * total, f"only {compared} of {total} steps could be compared"
    core.scheduler.blocks.check_integrity([])


def test_answers_survive_preemption(decoder: Decoder, on_gpu: Decoder) -> None:
    requests = [request(i, PROMPTS[i], max_new_tokens=150) for i in range(4)]
    ten_blocks = 10 * block_bytes(on_gpu.config, on_gpu.dtype) / (1 << 30)
    core = gpu_core(on_gpu, cache_gb=ten_blocks)
    check_equal(run_all(tiny_core(decoder, session_len=320), requests), run_all(core, requests), decoder, PROMPTS)
    assert core.scheduler.counters.num_preemptions > 0
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("depth", [0, 3])
def test_answers_do_not_depend_on_when_they_are_read(depth, on_gpu, decoder, monkeypatch) -> None:  # noqa: ANN001
    ahead = run_all(gpu_core(on_gpu), REQUESTS)
    monkeypatch.setattr(DeviceRunner, "depth", depth)
    check_equal(ahead, run_all(gpu_core(on_gpu), REQUESTS), decoder, PROMPTS)


def test_garbage_of_an_old_engine_does_not_break_a_capture(
    on_gpu: Decoder, alone: dict[int, list[int]], decoder
) -> None:  # noqa: ANN001
    """Its graphs are destroyed by whichever allocation sets the collector off: not by one inside a capture."""
    old = gpu_core(on_gpu)
    old.itself = old  # type: ignore[attr-defined]  # a cycle: only the collector finds it
    del old
    before = gc.get_threshold()
    gc.set_threshold(20, 1, 1)
    try:
        check_equal(alone, run_all(gpu_core(on_gpu), REQUESTS), decoder, PROMPTS)
    finally:
        gc.set_threshold(*before)


def test_sampling_depends_on_the_seed_alone(on_gpu: Decoder) -> None:
    together = run_all(gpu_core(on_gpu), SAMPLED)
    for one in SAMPLED:
        assert run_all(gpu_core(on_gpu), [one])[one.request_id] == together[one.request_id]
    assert together[0] != together[3]


def test_special_rows_are_those_of_the_cpu(on_gpu: Decoder, decoder: Decoder) -> None:
    together = run_all(gpu_core(on_gpu), SPECIAL)
    expected = run_all(tiny_core(decoder), SPECIAL)
    assert [together[i] for i in (1, 2, 3, 4, 5)] == [expected[i] for i in (1, 2, 3, 4, 5)]
    assert len(together[0]) == 20


def test_abort_frees_everything_at_once(on_gpu: Decoder, decoder: Decoder, alone: dict[int, list[int]]) -> None:
    core = gpu_core(on_gpu)
    for one in REQUESTS:
        core.add(one)
    for _ in range(5):
        core.step()
    for one in REQUESTS:
        core.abort(one.request_id)
    assert not core.has_work
    core.scheduler.blocks.check_integrity([])
    check_equal({i: alone[i] for i in range(2)}, run_all(core, REQUESTS[:2]), decoder, PROMPTS)


def forced(decoder: Decoder, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    return all_logits(decoder, [*prompt, *answer])[len(prompt) - 1 : -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_its_own_reference(dtype: torch.dtype) -> None:
    """Fed the same tokens, plain torch on the GPU agrees wherever the two largest logits are apart."""
    half = gpu_decoder(dtype, head_dim=64)
    answers = run_all(gpu_core(half), REQUESTS)
    compared = 0
    for i, prompt in PROMPTS.items():
        with torch.device("cuda"), kernels.force("reference"):
            logits = forced(half, prompt, answers[i])
        top = torch.topk(logits, 2)
        for step, token_id in enumerate(answers[i]):
            if top.values[step, 0] - top.values[step, 1] > 2e-2:
                assert token_id == int(top.indices[step, 0])
                compared += 1
    assert compared > 40


def test_survives_a_model_that_overflows(on_gpu: Decoder) -> None:
    """Neither an index out of the vocabulary, which would end the process, nor an answer."""
    broken = gpu_decoder()
    broken.final_norm.fill_(torch.nan)
    for requests in (SAMPLED, SPECIAL):
        overflows(gpu_core(broken), requests)
    assert len(run_all(gpu_core(on_gpu), REQUESTS[:1])[0]) == 40


def test_memory_that_is_short_is_said_with_the_flag_that_helps(
    on_gpu: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeviceRunner, "warm_up", no_memory)
    with pytest.raises(MemoryShortError, match="--max-batch-size"):
        gpu_core(on_gpu)
