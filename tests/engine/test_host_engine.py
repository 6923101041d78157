"""The engine on a cache that holds a quarter of its conversations: what left the device comes back from host memory,
and every answer is what it is when everything stays. A tiny random model."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch

from lmtool.checkpoint.hub import resolve_model
from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.core import EngineCore
from lmtool.engine.device_runner import DeviceRunner
from lmtool.engine.executor import LocalExecutor
from lmtool.engine.host_memory import HostPlan, check_host_tier
from lmtool.engine.host_tier import HostTier
from lmtool.engine.kv_cache import BLOCK_SIZE, CachePlan, block_bytes
from lmtool.engine.pipeline import Pipeline
from lmtool.engine.scheduler import Scheduler
from lmtool.engine.sequence import Request
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.errors import ConfigError, MemoryShortError
from lmtool.models.decoder import Decoder
from lmtool.tokenizer import load_tokenizer
from tests.support import TINY, check_equal, collect, request, run_all, tiny_core, tiny_decoder

NUM_CONVERSATIONS = 10
PROMPT_TOKENS = 200
HOST_GB = 60 * block_bytes(TINY, torch.float32) / (1 << 30)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


def late_core(decoder: Decoder, num_blocks: int, num_host: int, depth: int = 1) -> EngineCore:
    """What `build_core` makes on a GPU, here on a CPU: steps are launched before the ones before them are read."""

    class Late(DeviceRunner):
        pass

    Late.depth = depth
    one_block = block_bytes(decoder.config, decoder.dtype)
    plan = CachePlan(num_blocks=num_blocks, block_size=BLOCK_SIZE, block_bytes=one_block, session_len=320)
    host = HostPlan(num_blocks=num_host, block_bytes=one_block, num_staging=8) if num_host else None
    runner = Late(decoder, plan, max_batch_size=8, host=host)
    blocks = BlockManager(num_blocks, BLOCK_SIZE, host=HostTier(num_host, one_block))
    scheduler = Scheduler(blocks, max_batch_size=8, max_batched_tokens=256, join_group=2)
    return EngineCore(scheduler, LocalExecutor(runner), session_len=320)


def small_core(decoder: Decoder) -> EngineCore:
    return tiny_core(decoder, num_blocks=11, session_len=320, cache_host_gb=HOST_GB, max_batch_size=3)


def two_turns(core: EngineCore, at_once: int = NUM_CONVERSATIONS) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Every conversation's first turn, then every one's second: (answers by request, prompts)."""
    generator = torch.Generator().manual_seed(5)
    prompts = {
        i: torch.randint(0, 211, (PROMPT_TOKENS + i,), generator=generator).tolist() for i in range(NUM_CONVERSATIONS)
    }
    answers: dict[int, list[int]] = {}

    def run(first: int) -> None:
        for start in range(first, first + NUM_CONVERSATIONS, at_once):
            ids = range(start, min(start + at_once, first + NUM_CONVERSATIONS))
            answers.update(run_all(core, [request(i, prompts[i], max_new_tokens=12) for i in ids]))

    run(0)
    for i in range(NUM_CONVERSATIONS):
        prompts[100 + i] = [*prompts[i], *answers[i], 7, i]
    run(100)
    return answers, prompts


@pytest.fixture(scope="module")
def resident(decoder: Decoder) -> dict[int, list[int]]:
    core = tiny_core(decoder, num_blocks=100, session_len=320)
    answers, _ = two_turns(core)
    assert core.scheduler.counters.num_host_hit_blocks == 0
    return answers


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(small_core, id="plain"),
        pytest.param(lambda decoder: late_core(decoder, 11, 60), id="launched ahead"),
        pytest.param(lambda decoder: late_core(decoder, 11, 60, depth=3), id="launched far ahead"),
    ],
)
def test_conversations_return_from_the_host(
    make: Callable[[Decoder], EngineCore], decoder: Decoder, resident: dict[int, list[int]]
) -> None:
    core = make(decoder)
    answers, prompts = two_turns(core)
    check_equal(resident, answers, decoder, prompts)
    counters = core.scheduler.counters
    assert counters.num_host_hit_blocks >= 2 * NUM_CONVERSATIONS  # of three full blocks each; the device holds some
    assert counters.host_loaded_bytes == counters.num_host_hit_blocks * block_bytes(TINY, torch.float32)
    assert counters.host_saved_bytes >= 10 * block_bytes(TINY, torch.float32)
    assert counters.host_copy_s > 0
    core.scheduler.blocks.check_integrity([])


def test_a_host_tier_that_is_too_small_forgets_the_oldest(decoder: Decoder, resident: dict[int, list[int]]) -> None:
    core = late_core(decoder, 11, 7)
    answers, prompts = two_turns(core)
    check_equal(resident, answers, decoder, prompts)
    assert core.scheduler.counters.num_host_evictions > 0


def test_a_conversation_that_was_pushed_out_between_its_turns(decoder: Decoder) -> None:
    """One conversation with long pauses, in which others take the whole cache."""
    kept = tiny_core(decoder, num_blocks=60, session_len=320)
    pushed = small_core(decoder)
    generator = torch.Generator().manual_seed(8)
    turn = torch.randint(0, 211, (130,), generator=generator).tolist()
    answers: dict[str, dict[int, list[int]]] = {"kept": {}, "pushed": {}}
    prompts = {}
    for number in range(4):
        prompts[number] = list(turn)
        before = pushed.scheduler.counters.num_host_hit_tokens
        for name, core in (("kept", kept), ("pushed", pushed)):
            answers[name] |= run_all(core, [request(number, turn, max_new_tokens=20)])
        if number:
            assert pushed.scheduler.counters.num_host_hit_tokens - before >= BLOCK_SIZE
        others = [
            request(1000 + 10 * number + i, torch.randint(0, 211, (290,), generator=generator).tolist())
            for i in range(3)
        ]
        run_all(pushed, others)
        turn += answers["kept"][number] + [number, 3]
    check_equal(answers["kept"], answers["pushed"], decoder, prompts)


def tiny_pipeline(**settings: object) -> Pipeline:
    """Random weights behind a real tokenizer."""
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    decoder = tiny_decoder(replace(TINY, vocab_size=49152))
    core = tiny_core(decoder, session_len=384, **settings)  # type: ignore[arg-type]
    plan = core._executor._runner.plan  # type: ignore[attr-defined]
    loaded = LoadedEngine(core, decoder.config, plan, decoder.device, "float32", {}, 0.0)
    return Pipeline("tiny", loaded, tokenizer)


@pytest.mark.parametrize("host_gb", [HOST_GB, 0.0], ids=["from the host", "computed again"])
def test_a_session_goes_on_after_others_took_the_whole_cache(host_gb: float) -> None:
    """From the host where there is one; else it is computed again. Either way nobody notices."""
    brief = GenerationConfig(temperature=0, max_new_tokens=16, ignore_eos=True)
    with tiny_pipeline(num_blocks=100) as kept, tiny_pipeline(num_blocks=9, cache_host_gb=host_gb) as small:
        sessions = {pipe: pipe.session() for pipe in (kept, small)}
        answers: dict[str, dict[int, list[int]]] = {"kept": {}, "small": {}}
        prompts = {}
        for turn in range(3):
            said = f"turn {turn}:" + " the cat sat on the mat" * 8
            prompts[turn] = kept.tokenizer.chat_ids([*sessions[kept].messages, {"role": "user", "content": said}])
            for pipe, session in sessions.items():
                pipe.chat(said, session, brief)
                assert session.response is not None
                answers["kept" if pipe is kept else "small"][turn] = session.response.token_ids
            if turn:
                cached = [session.response.num_cached_tokens for session in sessions.values() if session.response]
                assert cached[0] > BLOCK_SIZE
                # without a host: what another's first block begins with alike
                assert (cached[1] >= BLOCK_SIZE) == bool(host_gb)
            sessions[small].messages = list(sessions[kept].messages)  # were there a near tie, they would part
            small([f"{turn} {other}" + " and a dog ran" * 60 for other in range(3)], brief)  # takes the whole cache
        assert (small.counters.num_host_hit_blocks >= 2) == (host_gb > 0)
        decoder = kept.loaded.core._executor._runner.decoder  # type: ignore[attr-defined]
        check_equal(answers["kept"], answers["small"], decoder, prompts)


@pytest.mark.parametrize("scheme", ["int8", "k8v4", "int4"])
def test_quantized_blocks_return_from_the_host(scheme: str, decoder: Decoder) -> None:
    """The codes that left are the codes that come back: the same engine, where all stays, says the same."""
    settings = {"session_len": 320, "kv_dtype": scheme}
    stays = tiny_core(decoder, **settings)
    plan = stays._executor._runner.plan  # type: ignore[attr-defined]
    small = (11 * plan.block_bytes + plan.num_open_blocks * plan.open_block_bytes) / (1 << 30)
    leaves = tiny_core(decoder, cache_gb=small, cache_host_gb=60 * plan.block_bytes / (1 << 30), **settings)
    assert (stays.scheduler.blocks.num_blocks, leaves.scheduler.blocks.num_blocks) == (48, 11)
    for core in (stays, leaves):
        core.scheduler.blocks.keep_tails = False  # so that both compute the same chunks
    answers, _ = two_turns(leaves, at_once=1)
    assert answers == two_turns(stays, at_once=1)[0]
    assert leaves.scheduler.counters.num_host_hit_blocks >= 2 * NUM_CONVERSATIONS
    assert stays.scheduler.counters.num_cached_tokens >= 2 * NUM_CONVERSATIONS * BLOCK_SIZE


# ---------------------------------------------------------------------- a long random life
def soak_jobs(random: Random) -> list[Request]:
    """Conversations whose later turns hold the earlier prompt: their beginnings return."""
    jobs = []
    for conversation in range(9):
        prompt = [random.randrange(211) for _ in range(random.randint(40, 130))]
        for turn in range(3):
            number = 10 * conversation + turn
            jobs.append(request(number, prompt, max_new_tokens=random.randint(2, 30)))
            prompt = prompt + [random.randrange(211) for _ in range(random.randint(1, 70))]
    return jobs


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_soak(depth: int, decoder: Decoder) -> None:
    """Random arrivals, aborts, evictions and returns: nothing is left, and nobody's answer tells of them."""
    random = Random(depth)
    jobs = soak_jobs(random)
    undisturbed = {
        one.request_id: run_all(tiny_core(decoder, num_blocks=8, session_len=320), [one])[one.request_id]
        for one in jobs
    }
    core = late_core(decoder, 10, 12, depth)
    arrivals = {one.request_id: random.randint(0, 60) + 120 * (one.request_id % 10) for one in jobs}
    aborts = {one.request_id: arrivals[one.request_id] + random.randint(0, 25) for one in random.sample(jobs, 8)}
    answers: dict[int, list[int]] = {one.request_id: [] for one in jobs}
    prompts = {one.request_id: list(one.prompt_ids) for one in jobs}
    aborted = set()
    for step in range(3000):
        for one in jobs:
            if arrivals[one.request_id] == step:
                core.add(one)
            if aborts.get(one.request_id) == step and core.abort(one.request_id) is not None:
                aborted.add(one.request_id)
        if core.has_work:
            collect(core.step(), answers)
        elif step > max(arrivals.values()):
            break
    assert not core.has_work
    assert aborted
    whole = {i: answer for i, answer in undisturbed.items() if i not in aborted}
    check_equal(whole, {i: answers[i] for i in whole}, decoder, prompts)
    begun = {i: undisturbed[i][: len(answers[i])] for i in aborted if answers[i]}
    if begun:
        check_equal(begun, {i: answers[i] for i in begun}, decoder, prompts)
    blocks, counters = core.scheduler.blocks, core.scheduler.counters
    blocks.check_integrity([])
    assert blocks.num_free == 9
    assert blocks.host.num_pinned == 0
    assert counters.num_host_hit_blocks > 0
    assert counters.num_host_evictions > 0


# ---------------------------------------------------------------------- what is refused
def test_more_than_the_host_has_is_refused_before_anything_is_loaded(tmp_path) -> None:  # noqa: ANN001
    config = EngineConfig(device="cpu", cache_host_gb=1e6)
    wanted = r"^--cache-host-gb 1e\+06 asks for more than nine tenths of the .* that are free; give at most "
    with pytest.raises(MemoryShortError, match=wanted):
        check_host_tier(config)
    with pytest.raises(MemoryShortError, match=wanted):
        load_engine(tmp_path, config)  # there is not even a checkpoint


def test_less_than_a_block_is_refused(decoder: Decoder) -> None:
    with pytest.raises(MemoryShortError, match=r"--cache-host-gb 1e-06 holds not one block of 0.0 MiB; give more"):
        tiny_core(decoder, cache_host_gb=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_host_gb": -1}, r"--cache-host-gb is -1; give a size in GiB, or 0: no host memory"),
        ({"cache_host_gb": float("inf")}, r"--cache-host-gb is inf; give a size"),
        ({"cache_host_gb": "much"}, r"--cache-host-gb is 'much'; give a number"),
        ({"cache_host_gb": 2, "prefix_caching": False}, r"--cache-host-gb is 2; give 0, or leave prefix_caching on"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)  # type: ignore[arg-type]
