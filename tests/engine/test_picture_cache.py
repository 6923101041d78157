"""What the cache knows of pictures: found again wherever they lie among its blocks, on the device and in host memory,
never taken for one another, and the same answers whatever became of their blocks meanwhile."""

from pathlib import Path
from typing import Any

import pytest

from lmtool.engine.core import EngineCore
from lmtool.engine.kv_cache import BLOCK_SIZE, block_bytes
from lmtool.images.form import ImageForm
from lmtool.models.decoder import Decoder
from tests.engine.test_pictures import Prompt, request
from tests.models.test_llava import load, picture
from tests.support import run_all, tiny_core
from tests.tiny_llava import tiny_llava

ROWS = 88  # of a picture of 56 x 56 pixels: more than a block holds
Loaded = tuple[Decoder, ImageForm]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder: Path = tmp_path_factory.mktemp("llava")
    tiny_llava(folder)
    return load(folder)


def text(count: int, first: int = 0) -> list[int]:
    return [(first + 7 * i) % 390 for i in range(count)]


def ask(core: EngineCore, request_id: int, prompt: Prompt, **settings: Any) -> tuple[list[int], int]:
    """(answer, tokens that the cache had)."""
    before = core.scheduler.counters.num_cached_tokens
    answer = run_all(core, [request(request_id, prompt, **settings)])[request_id]
    return answer, core.scheduler.counters.num_cached_tokens - before


@pytest.mark.parametrize("before", [1, 30, 40, 63, 64, 65])
@pytest.mark.parametrize("kv_dtype", ["model", "int8", "int4"])
def test_the_same_picture_again_computes_only_the_text_after_it(
    loaded: Loaded, encoded: list[int], kv_dtype: str, before: int
) -> None:
    decoder, form = loaded
    shown, other = (form.prepare(picture((56, 56), seed)) for seed in (0, 1))
    assert shown.num_tokens == ROWS
    core = tiny_core(decoder, num_blocks=40, kv_dtype=kv_dtype)
    ask(core, 0, [*text(before), shown, 5, 6, 7])
    again, num_cached = ask(core, 1, [*text(before), shown, 20, 21])
    shared = before + ROWS
    # of a cache of 4 bits only full blocks outlive their slot
    assert num_cached == (shared // BLOCK_SIZE * BLOCK_SIZE if kv_dtype == "int4" else shared)
    assert len(encoded) == (2 if num_cached < shared else 1)
    _, num_of_other = ask(core, 2, [*text(before), other, 20, 21])
    assert num_of_other <= before
    fresh = tiny_core(decoder, num_blocks=40, kv_dtype=kv_dtype)
    assert ask(fresh, 1, [*text(before), shown, 20, 21]) == (again, 0)


@pytest.mark.parametrize("host_blocks", [0, 60], ids=["no host tier", "host tier"])
@pytest.mark.parametrize("max_batched_tokens", [64, 512])
def test_after_its_blocks_were_taken(
    loaded: Loaded, encoded: list[int], host_blocks: int, max_batched_tokens: int
) -> None:
    decoder, form = loaded
    host_gb = host_blocks * block_bytes(decoder.config, decoder.dtype) / (1 << 30)
    core = tiny_core(
        decoder, num_blocks=12, session_len=512, cache_host_gb=host_gb, max_batched_tokens=max_batched_tokens
    )
    shown, other = (form.prepare(picture((56, 56), seed)) for seed in (0, 1))
    prompt = [*text(30), shown, *text(80, 3)]
    first, _ = ask(core, 0, prompt)
    for i in range(1, 9):
        ask(core, i, text(150, i))
    assert len(encoded) == 1
    again, num_cached = ask(core, 10, prompt)
    assert again == first
    if host_blocks:
        assert core.scheduler.counters.num_host_hit_blocks >= 2
        assert num_cached >= 2 * BLOCK_SIZE
        assert len(encoded) == 1
    else:
        assert num_cached < BLOCK_SIZE
        assert len(encoded) == 2
    instead = [*text(30), other, *text(80, 3)]
    answer, num_cached = ask(core, 11, instead)
    assert num_cached <= 30
    assert answer == ask(tiny_core(decoder, num_blocks=40), 11, instead)[0]
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_preempted_answer_about_a_picture_goes_on_as_it_would_have(loaded: Loaded, prefix_caching: bool) -> None:
    decoder, form = loaded
    prompts: dict[int, Prompt] = {i: [*text(20 + i), form.prepare(picture((56, 56), i)), *text(9, i)] for i in range(4)}
    settings: dict[str, Any] = {"prefix_caching": prefix_caching, "session_len": 512}
    requests = [request(i, prompt, max_new_tokens=120) for i, prompt in prompts.items()]
    core = tiny_core(decoder, num_blocks=10, **settings)
    answers = run_all(core, requests)
    assert core.scheduler.counters.num_preemptions > 0
    for one in requests:
        assert run_all(tiny_core(decoder, num_blocks=40, **settings), [one])[one.request_id] == answers[one.request_id]
