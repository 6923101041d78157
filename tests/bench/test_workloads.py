"""Mixes: the same everywhere for one seed, and of the distribution that they claim."""

import statistics
import subprocess
import sys

import pytest

from lmtool.bench import workloads
from lmtool.bench.workloads import Size, Workload
from lmtool.errors import ConfigError


def _quantile(values: list[int], share: float) -> int:
    return sorted(values)[int(share * len(values))]


def test_static_is_what_was_asked_for() -> None:
    workload = workloads.static(16, 128, 256)
    assert workload.name == "b16 128/256"
    assert workload.sizes == (Size(128, 256),) * 16
    assert (workload.num_prompt_tokens, workload.num_new_tokens, workload.longest) == (2048, 4096, 384)


@pytest.mark.parametrize("make", [workloads.chat, workloads.sharegpt, workloads.uniform])
def test_a_mix_is_its_seed(make: workloads.Callable[..., Workload]) -> None:
    assert make(50, seed=3) == make(50, seed=3)
    assert make(50, seed=3).sizes != make(50, seed=4).sizes


def test_chat_is_lognormal_and_clipped() -> None:
    sizes = workloads.chat(20_000).sizes
    inputs, outputs = [s.num_prompt_tokens for s in sizes], [s.num_new_tokens for s in sizes]
    for lengths in (inputs, outputs):
        assert min(lengths) >= 4
        assert max(lengths) == 1024
    # medians e^4.6 = 99.5 and e^4.9 = 134.3; a standard deviation is e^1.2 and e^0.9 of that
    assert statistics.median(inputs) == pytest.approx(99.5, rel=0.05)
    assert statistics.median(outputs) == pytest.approx(134.3, rel=0.05)
    assert _quantile(inputs, 0.8413) == pytest.approx(99.5 * 3.320, rel=0.06)
    assert _quantile(outputs, 0.8413) == pytest.approx(134.3 * 2.460, rel=0.06)


def test_sharegpt_has_the_published_means_and_quantiles() -> None:
    """perf.md §5: mean 217 in and 208 out, 19/125/578/956 and 41/144/472/892 at 10, 50, 90 and 99 %."""
    sizes = workloads.sharegpt(20_000).sizes
    inputs, outputs = [s.num_prompt_tokens for s in sizes], [s.num_new_tokens for s in sizes]
    assert max(s.num_tokens for s in sizes) <= 2048
    assert statistics.mean(inputs) == pytest.approx(217, rel=0.04)
    assert statistics.mean(outputs) == pytest.approx(208, rel=0.04)
    for share, num_in, num_out in ((0.1, 19, 41), (0.5, 125, 144), (0.9, 578, 472), (0.99, 956, 892)):
        assert _quantile(inputs, share) == pytest.approx(num_in, rel=0.08)
        assert _quantile(outputs, share) == pytest.approx(num_out, rel=0.08)


def test_prompts_are_seeded_ids_of_the_vocabulary() -> None:
    workload = workloads.chat(40)
    prompts = workload.prompts(211, seed=1)
    assert prompts == workload.prompts(211, seed=1)
    assert prompts != workload.prompts(211, seed=2)
    assert [len(prompt) for prompt in prompts] == [size.num_prompt_tokens for size in workload.sizes]
    ids = {i for prompt in prompts for i in prompt}
    assert ids == set(range(211))


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    prompts = workloads.shared_prefix(4, prefix_len=64, input_len=16).prompts(50000, seed=0)
    assert len({prompt[:64] for prompt in prompts}) == 1
    assert len({prompt[64:] for prompt in prompts}) == 4
    assert {len(prompt) for prompt in prompts} == {80}


def test_mixes_by_name() -> None:
    assert workloads.mix("chat").name == workloads.mix("chat1000").name == "chat1000"
    assert len(workloads.mix("shared-prefix7").sizes) == 7
    assert workloads.mix("sharegpt20", seed=5) == workloads.sharegpt(20, seed=5)


@pytest.mark.parametrize("name", ["", "chta", "chat0", "chat-1", "chat 10", "10"])
def test_an_unknown_mix_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--mix .* is not known; give static, chat, sharegpt"):
        workloads.mix(name)


def test_workloads_need_neither_engine_nor_torch() -> None:
    script = "import sys, lmtool.bench.workloads; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "torch" not in loaded
    assert not [name for name in loaded if name.startswith("lmtool.engine")]
