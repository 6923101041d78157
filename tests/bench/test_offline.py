"""The runner on a real engine with a tiny random decoder: every count is exact, every rate has its limit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmtool.bench import compare, offline, workloads
from lmtool.bench.limits import Limits
from lmtool.bench.transformers_peer import TransformersPeer, hf_config
from lmtool.bench.workloads import Size, Workload
from lmtool.config import EngineConfig
from lmtool.engine.setup import LoadedEngine
from lmtool.errors import ConfigError, EngineError, MemoryShortError
from tests.support import TINY, request, run_all, tiny_core
from tests.tiny_llava import tiny_llava

CPU = torch.device("cpu")
CONFIG = EngineConfig(device="cpu", dtype="float32", max_batch_size=8, max_batched_tokens=64, cache_gb=0.05)
# a machine on which a step of the tiny decoder takes microseconds: shares are small, but exact
LIMITS = Limits(
    device="test", read_bytes_per_s=1e11, copy_bytes_per_s=1e11, matmul_flops_per_s=1e12, matmul_dtype="float32"
)
MIXED = Workload("mixed", (Size(5, 3), Size(100, 7), Size(30, 1), Size(1, 12)))


@pytest.fixture(scope="module")
def tiny() -> LoadedEngine:
    return offline.load(TINY, CONFIG, [MIXED, workloads.static(3, 16, 9)])


def test_every_token_is_counted(tiny: LoadedEngine) -> None:
    result = offline.measure(tiny, MIXED, max_batch_size=8, limits=LIMITS, repeats=3, warm_up=1)
    assert (result.num_requests, result.num_prompt_tokens, result.num_generated_tokens) == (4, 136, 23)
    # the budget of 64 cuts the second prompt in two; the longest answer begins in the third step at the latest
    assert 12 <= result.num_steps <= 14
    assert result.num_preemptions == 0
    assert len(result.durations_s) == 3
    assert not tiny.core.has_work


def test_rates_agree_with_durations_and_limits(tiny: LoadedEngine) -> None:
    result = offline.measure(tiny, MIXED, max_batch_size=8, limits=LIMITS, repeats=3, warm_up=0)
    output = result.metrics["output_tokens_per_s"]
    assert output.median == pytest.approx(23 / sorted(result.durations_s)[1])
    assert output.best == pytest.approx(23 / min(result.durations_s))
    assert output.limit is not None
    assert output.ratio == pytest.approx(output.median / output.limit)
    first = result.metrics["time_to_first_token_s"]
    assert first.best <= first.median
    assert first.limit is not None
    assert first.ratio == pytest.approx(first.limit / first.median)
    shares = {name: metric.ratio for name, metric in result.metrics.items() if metric.ratio is not None}
    assert set(result.metrics) - set(shares) == {"prefill_tokens_per_s", "decode_tokens_per_s"}, "requests differ"
    assert all(0 < share < 1 for share in shares.values())
    assert result.num_bytes
    assert result.flops


def test_without_limits_there_are_no_shares(tiny: LoadedEngine) -> None:
    result = offline.measure(tiny, MIXED, max_batch_size=8, repeats=1, warm_up=0)
    assert all(metric.limit is metric.ratio is None for metric in result.metrics.values())
    assert result.flops is None


def test_a_prefill_has_no_decode_and_each_run_new_prompts(tiny: LoadedEngine) -> None:
    before = tiny.core.scheduler.counters.num_cached_tokens
    result = offline.measure(tiny, workloads.prefill(64), max_batch_size=8, repeats=3)
    assert set(result.metrics) == {"time_to_first_token_s", "prefill_tokens_per_s"}
    assert tiny.core.scheduler.counters.num_cached_tokens == before == 0


def test_the_prefix_cache_serves_a_shared_prefix() -> None:
    shared = workloads.shared_prefix(4, prefix_len=128, input_len=10)
    loaded = offline.load(TINY, CONFIG, [shared])
    offline.measure(loaded, shared, max_batch_size=8, repeats=1, warm_up=0)
    assert loaded.core.scheduler.counters.num_cached_tokens >= 2 * 128
    with pytest.raises(ConfigError, match=r"--mix shared-prefix4 is measured with the prefix cache"):
        offline.load(TINY, CONFIG, [shared, MIXED])


def test_what_drive_runs_is_what_the_engine_answers() -> None:
    """The same requests stepped here and by the tests' own loop."""
    prompts = MIXED.prompts(TINY.vocab_size, seed=0)
    counts = [size.num_new_tokens for size in MIXED.sizes]
    core = tiny_core()
    run = offline.drive(core, offline.greedy_requests(prompts, counts))
    plain = [request(i, prompt, max_new_tokens=n) for i, (prompt, n) in enumerate(zip(prompts, counts, strict=True))]
    answers = run_all(core, plain)
    assert run.num_generated_tokens == sum(map(len, answers.values())) == 23
    assert set(run.first_token_s) == {0, 1, 2, 3}
    assert run.duration_s == pytest.approx(sum(step.duration_s for step in run.steps))


def test_an_answer_that_is_too_short_is_an_error() -> None:
    core = tiny_core(session_len=20)
    with pytest.raises(EngineError, match="1 of 2 requests got another number of tokens"):
        offline.drive(core, offline.greedy_requests([(1,) * 10, (2,) * 10], [10, 15]))


def test_the_bytes_of_the_cache_are_the_engines_own(tiny: LoadedEngine) -> None:
    cost = offline.engine_cost(tiny)
    assert cost is not None
    assert cost.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, float32
    assert offline.engine_cost(replace(tiny, weights="int3")) is None
    of_two = replace(
        tiny, weights="float32, in 2 parts", plan=replace(tiny.plan, block_bytes=tiny.plan.block_bytes // 2)
    )
    assert offline.engine_cost(of_two, 2) == cost, "a rank's cache holds half of each token"


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made() -> None:
    huge = replace(TINY, vocab_size=10**9, hidden_size=2**14)
    with pytest.raises(MemoryShortError, match=r"the weights need .* GiB on cpu, .* GiB are free"):
        offline.load(huge, CONFIG, [MIXED])


def test_a_workload_beyond_the_context_is_refused_by_name(tmp_path: Path) -> None:
    from tests.models.test_against_hf import hf_model

    hf_model("Llama").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"prefill 99999 has a request of 100000 tokens, the model's context is \d+; "
    ):
        offline.load(tmp_path, CONFIG, [workloads.prefill(99999)])


# ---------------------------------------------------------------------- beside transformers
class _Scripted:
    """A contestant whose times are known: ``first_s`` a prefill, ``step_s`` a step."""

    def __init__(self, name: str, first_s: float, step_s: float) -> None:
        self.name, self._first_s, self._step_s = name, first_s, step_s

    def step_times(self, prompts: list[workloads.Prompt], num_new_tokens: int) -> tuple[float, list[float]]:
        return self._first_s, [self._step_s] * (num_new_tokens - 1)


def test_the_best_dtype_is_chosen_for_each_case(tiny: LoadedEngine) -> None:
    peers = [_Scripted("float32", 1.0, 1e3), _Scripted("bfloat16", 1e3, 10.0)]
    cases = compare.cases([1, 8], 16, 9, 512, cpu=True)
    assert [case.name for case in cases] == ["decode b1", "decode b8", "prefill 512"]
    assert [(case.bar, case.goal) for case in cases] == [(2.0, 3.0), (1.4, None), (1.0, None)]
    cases = [cases[0], cases[1], replace(cases[2], input_len=40)]
    found = compare.compare(tiny, peers, cases, limits=LIMITS, repeats=3)
    assert [(one.theirs, one.theirs_tokens_per_s) for one in found] == [
        ("bfloat16", 0.1),
        ("bfloat16", 0.8),
        ("float32", 40.0),
    ]
    for one in found:
        assert one.ours == "float32"
        assert one.ratio == pytest.approx(one.ours_tokens_per_s / one.theirs_tokens_per_s)
        assert one.ok is True
        assert one.limit_ratio is not None
        assert 0 < one.limit_ratio < 1


def test_a_missed_bar_is_short_and_no_bar_no_verdict(tiny: LoadedEngine) -> None:
    fast = [_Scripted("float32", 1e-9, 1e-9)]
    with_bar = compare.compare(tiny, fast, compare.cases([1], 16, 4, 0, cpu=True), repeats=1)
    without = compare.compare(tiny, fast, compare.cases([1], 16, 4, 0, cpu=False), repeats=1)
    assert (with_bar[0].ok, without[0].ok) == (False, None)
    assert with_bar[0].limit_ratio is None


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_transformers_gets_the_same_shape(qkv_bias: bool) -> None:
    shape = replace(TINY, qkv_bias=qkv_bias, tie_word_embeddings=qkv_bias)
    peer = TransformersPeer(shape, torch.float32, CPU)
    num_biases = shape.num_layers * shape.qkv_size if qkv_bias else 0
    assert peer._model.num_parameters() == shape.num_parameters + num_biases
    assert hf_config(shape)["model_type"] == ("qwen2" if qkv_bias else "llama")
    first_s, steps_s = peer.step_times([(1, 2, 3), (4, 5, 6)], 6)
    assert first_s > 0
    assert len(steps_s) == 5
    assert all(step_s > 0 for step_s in steps_s)


def test_transformers_gets_the_same_weights_of_a_folder(tmp_path: Path) -> None:
    from tests.models.test_against_hf import hf_model

    model = hf_model("Llama")
    model.save_pretrained(tmp_path)
    peer = TransformersPeer(tmp_path, torch.float32, CPU)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(peer._model(ids).logits, model(ids).logits)
    assert len(peer.step_times([(5, 6, 7)], 4)[1]) == 3


def test_a_folder_that_transformers_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}')
    with pytest.raises(ConfigError, match=r"--against transformers: it cannot load .*; compare by --shape"):
        TransformersPeer(tmp_path, torch.float32, CPU)


def test_the_gguf_that_ships_with_lmtool_is_the_same_model() -> None:
    """Its own tensors, dequantized by our reader, say Paris."""
    from lmtool.checkpoint.hub import resolve_model

    path = resolve_model("smollm2-135m")
    peer = TransformersPeer(path, torch.float32, CPU)
    from lmtool.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    ids = tokenizer.chat_ids([{"role": "user", "content": "What is the capital of France?"}])
    with torch.inference_mode():
        answer = peer._model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)
    assert tokenizer.decode(answer[0, len(ids) :].tolist()) == "The capital of France is Paris."


@pytest.mark.parametrize("original", [False, True])
def test_of_a_llava_its_language_model_is_compared(original: bool, tmp_path: Path) -> None:
    model = tiny_llava(tmp_path, original=original)
    peer = TransformersPeer(tmp_path, torch.float32, CPU)
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(peer._model(ids).logits, model(input_ids=ids).logits)
