"""An engine of two processes over a cache of four bits: structured output, and the tier in the host's memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtool.config import EngineConfig
from lmtool.engine.core import EngineCore
from lmtool.engine.grammar_frames import GrammarVocabulary
from lmtool.engine.sequence import Request
from lmtool.engine.setup import load_engine
from lmtool.engine.swap_cost import SwapCost
from lmtool.errors import RanksLost
from tests.quant.models import tiny_folder
from tests.support import request, run_all

SETTINGS = {
    "dtype": "float32",
    "device": "cpu",
    "max_batch_size": 4,
    "session_len": 240,
    "kv_dtype": "int4",
    "cache_gb": 0.02,
}
CACHE_GB = 0.0001
SIZE = 341
VOCABULARY = GrammarVocabulary([bytes([i]) for i in range(210)] + [b"\xff<end>"] * (SIZE - 210), [210])
WORDS = {"type": "regex_schema", "regex_schema": "(ab|cd){3,5}"}
ALWAYS = SwapCost(load_bytes_per_s=1e12, block_bytes=1)  # to load is cheaper than to compute
LONG = {i: [1 + i, 5, 9, 7 + i] * 50 for i in range(6)}


def engine(folder: Path, tp: int, **settings: object) -> EngineCore:
    core = load_engine(folder, EngineConfig(**{**SETTINGS, "tp": tp, **settings})).core  # type: ignore[arg-type]
    core.scheduler.loads._swap_cost = ALWAYS
    return core


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "Qwen2ForCausalLM", max_position_embeddings=512)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[EngineCore]:
    """One process that has room for everything."""
    core = engine(folder, 1)
    core.give_vocabulary(lambda: VOCABULARY)
    yield core
    core.close()


@pytest.fixture(scope="module")
def together(folder: Path, alone: EngineCore) -> Iterator[EngineCore]:
    """Two ranks; their cache holds less than half of what `LONG` needs. Grammars are the other one's: a second process
    for them would cost more than all that is tested here."""
    core = engine(folder, 2, cache_gb=CACHE_GB, cache_host_gb=0.02)
    core._grammars = alone._grammars
    yield core
    core.close()


def turns(first_id: int) -> list[Request]:
    return [request(first_id + i, ids, max_new_tokens=8) for i, ids in LONG.items()]


def test_structured_output(alone: EngineCore, together: EngineCore) -> None:
    asked = [request(i, [i] * (30 + i), max_new_tokens=40, response_format=WORDS) for i in range(3)]
    asked += [request(10 + i, ids[:90], max_new_tokens=12) for i, ids in LONG.items()]
    expected, answers = run_all(alone, asked), run_all(together, asked)
    assert answers == expected
    for i in range(3):
        assert re.fullmatch(rb"(ab|cd){3,5}", bytes(token for token in answers[i] if token != 210))


def test_blocks_come_back_from_each_rank_s_part_of_the_host_s_memory(alone: EngineCore, together: EngineCore) -> None:
    assert together.scheduler.blocks.num_blocks < 2 * len(LONG)
    expected = run_all(alone, turns(20))
    assert run_all(together, turns(20)) == expected
    again = run_all(together, turns(30))
    assert {i - 10: answer for i, answer in again.items()} == expected
    assert together.scheduler.counters.num_host_hit_tokens > 100
    host = together.scheduler.blocks.host
    assert host.num_blocks * host.block_bytes <= 0.02 * (1 << 30) / 2  # the other half is the other rank's


def test_a_copy_that_fails_on_one_rank_ends_the_engine_with_an_error(together: EngineCore) -> None:
    """The last test: nothing runs here any more."""
    together._executor._runner._copies._host._chunks.clear()  # type: ignore[attr-defined]
    with pytest.raises(RanksLost, match="host tier failed on one rank"):
        run_all(together, turns(40))
