"""An engine of several processes: answers are those of one, and a rank that dies ends it with a clear error."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtool.config import EngineConfig
from lmtool.engine import rank_start, rank_watch
from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.batch import Batch
from lmtool.engine.core import TokenOutput
from lmtool.engine.frames import Frames
from lmtool.engine.rank_start import RankHandle
from lmtool.engine.rank_wire import Present
from lmtool.engine.sequence import Request
from lmtool.engine.setup import LoadedEngine, load_engine
from lmtool.engine.silence import expect_within
from lmtool.errors import CheckpointError, ConfigError, RanksLost
from lmtool.models.decoder import Decoder
from tests.models.test_quantized import quantize
from tests.models.test_shard import load
from tests.quant.models import tiny_folder
from tests.support import check_equal, request, run_all

PROMPTS = {i: [1 + i, 5, 9, 7 + i] * (3 + 6 * i) for i in range(5)}
WAIT_S = 120.0  # generous: the machine is shared


def engine(folder: Path, **settings: Any) -> LoadedEngine:
    given = {"dtype": "float32", "device": "cpu", "cache_gb": 0.02, "max_batch_size": 8, **settings}
    return load_engine(folder, EngineConfig(**given))


def requests() -> list[Request]:
    return [request(i, ids, max_new_tokens=10) for i, ids in PROMPTS.items()]


def answers_of(loaded: LoadedEngine, asked: list[Request]) -> dict[int, list[int]]:
    try:
        return run_all(loaded.core, asked)
    finally:
        loaded.core.close()


def decoder_of(folder: Path) -> Decoder:
    return load(folder)


BAD_ID = 200  # whose row of the embedding is no number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers are long enough for something to happen meanwhile."""
    path = tiny_folder(tmp_path_factory.mktemp("model"), "Qwen2ForCausalLM", max_position_embeddings=100_000)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_ID] = torch.nan
    save_file(weights, path / "model.safetensors")
    return path


def test_answers_are_those_of_one_process_whatever_breaks_in_between(folder: Path) -> None:
    """A step that breaks on all ranks ends its requests; one that breaks on some ends the engine, and soon."""
    alone = answers_of(engine(folder), requests())
    loaded = engine(folder, tp=2)
    try:
        loaded.core.add(request(100, [BAD_ID, BAD_ID]))
        error = loaded.core.step()[0].error
        assert "logits are not numbers" in str(error)
        assert not isinstance(error, RanksLost)
        check_equal(alone, run_all(loaded.core, requests()), decoder_of(folder), PROMPTS)

        ranks = loaded.core._executor._ranks  # type: ignore[attr-defined]
        tell = ranks.launch

        def of_another_slot(batch: Batch) -> int:
            """What the other rank hears is nothing that it could do."""
            return tell(replace(batch, chunks=[replace(chunk, slot=1000) for chunk in batch.chunks]))

        ranks.launch = of_another_slot
        loaded.core.add(request(101, [1, 2]))
        begun = time.monotonic()
        with pytest.raises(RanksLost, match="rank 1 of 2 broke in a step: IndexError"):
            loaded.core.step()
        assert time.monotonic() - begun < 60, "torch's own time limit is ten minutes"
    finally:
        loaded.core.close()
    assert not torch.distributed.is_initialized()


def test_chunks_over_a_cache_of_eight_bits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "Qwen3ForCausalLM")
    settings = {"max_batched_tokens": 64, "kv_dtype": "int8"}
    alone = answers_of(engine(folder, **settings), requests())
    together = answers_of(engine(folder, tp=2, **settings), requests())
    check_equal(alone, together, decoder_of(folder), PROMPTS, kv_dtype="int8")


def test_four_bits_and_what_few_ask_for(tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path, hidden_size=128, intermediate_size=256), "awq")
    asked = [
        request(0, PROMPTS[0], max_new_tokens=8, repetition_penalty=1.2, logprobs=2),
        request(1, PROMPTS[1], max_new_tokens=8, temperature=0.8, seed=3, top_k=20, top_p=0.9),
        request(2, PROMPTS[2], max_new_tokens=8, bad_ids=((7,), (8, 9)), prompt_logprobs=1),
    ]
    assert answers_of(engine(folder, tp=2), asked) == answers_of(engine(folder), asked)


def until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Poll: what is waited for happens in another process, or thread."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + within_s, "it did not happen"
        time.sleep(0.05)


class Waiting:
    """What came for each request, and a flag when one has ended. when_begun: done by the engine's thread, so that the
    request cannot have ended before."""

    def __init__(self, when_begun: Callable[[], None] = lambda: None) -> None:
        self.outputs: list[TokenOutput] = []
        self.begun, self.over = threading.Event(), threading.Event()
        self._when_begun = when_begun

    def __call__(self, outputs: list[TokenOutput]) -> None:
        self.outputs += outputs
        if not self.begun.is_set():
            self._when_begun()
        self.begun.set()
        if any(output.finish_reason is not None for output in outputs):
            self.over.set()


def be_impatient(monkeypatch: pytest.MonkeyPatch, loaded: LoadedEngine) -> None:
    """Who says nothing for 6 s stands still from now on: while ranks load on a shared machine they may be silent for
    longer."""
    watch = loaded.core._executor._ranks.watch  # type: ignore[attr-defined]
    monkeypatch.setattr(rank_watch, "STILL_S", 6.0)
    for handle in watch.handles:
        expect_within(handle.frames.connection, 6.0)  # from when it is heard next
    before = dict(watch._steps)
    until(lambda: all(watch._steps.get(rank) != before.get(rank) for rank in range(1, len(watch.handles) + 1)))


def test_a_rank_that_dies_is_a_clear_error_and_never_a_hang(tmp_path: Path) -> None:
    """Over a cache that is too small for all at once."""
    folder = tiny_folder(tmp_path, "LlamaForCausalLM", max_position_embeddings=100_000)
    settings = {"cache_gb": 0.002, "session_len": 1000}
    alone = answers_of(engine(folder, **settings), requests())
    loaded = engine(folder, tp=2, **settings)
    check_equal(alone, run_all(loaded.core, requests()), decoder_of(folder), PROMPTS)
    pid = loaded.core._executor._ranks.watch.handles[0].pid  # type: ignore[attr-defined]
    running, waiting = AsyncEngine(loaded.core), Waiting(lambda: os.kill(pid, signal.SIGKILL))
    running.submit(request(100, [1, 2, 3], max_new_tokens=900), waiting)
    assert waiting.over.wait(WAIT_S), "nobody was told"
    assert "rank 1 of 2 has ended" in str(waiting.outputs[-1].error)
    with pytest.raises(Exception, match="rank 1 of 2 has ended"):
        running.submit(request(101, [1]), waiting)
    running.close()
    assert not torch.distributed.is_initialized()


def test_a_rank_that_stands_still_is_no_hang_either(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the system says so: its process lives, and its connections are open."""
    monkeypatch.setattr(rank_watch, "_END_S", 60.0)
    loaded = engine(folder, tp=2)
    be_impatient(monkeypatch, loaded)
    (handle,) = loaded.core._executor._ranks.watch.handles  # type: ignore[attr-defined]
    running, waiting = AsyncEngine(loaded.core), Waiting(lambda: os.kill(handle.pid, signal.SIGSTOP))
    running.submit(request(0, [1, 2, 3], max_new_tokens=90_000), waiting)
    assert waiting.over.wait(WAIT_S), "nobody was told"
    assert "rank 1 of 2 stands still: it said nothing for 6 s; its process was stopped" in str(
        waiting.outputs[-1].error
    )
    begun = time.monotonic()
    running.close()
    assert time.monotonic() - begun < 30, "it waited for a rank that could not end"
    assert handle._process.returncode == -signal.SIGKILL
    assert not torch.distributed.is_initialized()


def test_a_rank_that_lives_but_does_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it is there, and never that it has launched what the first rank has; when that has launched nothing
    either, it may be quiet for ever."""
    clock = [0.0]
    monkeypatch.setattr(rank_watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch, (ours, theirs) = rank_watch.RankWatch(2), socket.socketpair()
    watch.hold(1, RankHandle("rank 1 of 2", ours))

    def say(number: int, at_s: float) -> None:
        clock[0] = at_s
        Frames(theirs, None).send(Present(number))

    def is_heard(number: int, at_s: float) -> None:
        say(number, at_s)
        until(lambda: watch._steps.get(1) == (number, at_s))

    watch.launched(2)
    for at_s in (0.0, 100.0, 1000.0):
        is_heard(2, at_s)
    watch.check()
    watch.launched(3)
    watch.launched(4)
    is_heard(3, 1001.0)
    say(3, 1002.0 + rank_watch.STILL_S)
    theirs.settimeout(WAIT_S)
    assert theirs.recv(1) == b"", "it is hung up on"
    with pytest.raises(RanksLost, match=r"rank 1 of 2 stands still: it launched nothing after step 3 for 60 s"):
        watch.check()
    watch.close()
    theirs.close()


FAKE_RANK = """
import json, socket, sys
from lmtool.engine.frames import Frames
from lmtool.engine.rank_wire import Arrived

orders = json.loads(sys.stdin.readline())
Frames(socket.socket(fileno=orders["socket_fd"]), None).send(Arrived())
"""


@pytest.mark.parametrize("when", ["before it joins", "while others join"])
def test_a_rank_that_dies_before_it_has_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """It is not waited for: torch alone would wait for minutes. The second one says that it is there, and leaves."""
    command = [sys.executable, "-c", FAKE_RANK if when == "while others join" else "import sys; sys.stdin.readline()"]
    monkeypatch.setattr(rank_start, "module_command", lambda name: command)
    begun = time.monotonic()
    with pytest.raises(RanksLost, match="rank 1 of 2 has ended"):
        engine(folder, tp=2)
    assert time.monotonic() - begun < 60
    assert not torch.distributed.is_initialized()


def test_a_start_that_failed_leaves_the_next_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up minutes later, on a thread that nobody waits for: then the process's group is another's."""
    left: list[str] = []
    monkeypatch.setattr(rank_watch, "leave_group", lambda: left.append(threading.current_thread().name))
    watch, given_up = rank_watch.RankWatch(2), threading.Event()
    joining: list[threading.Thread] = []

    def join_group() -> Any:
        joining.append(threading.current_thread())
        given_up.wait(WAIT_S)
        raise RuntimeError("nobody came")

    watch.lose(RanksLost("rank 1 of 2 has ended"))
    with pytest.raises(RanksLost):
        watch.join(join_group)
    watch.close()
    given_up.set()
    until(lambda: joining and not joining[0].is_alive())
    assert left == ["lmtool-leave"]


@pytest.mark.parametrize(
    ("difference", "settings", "error", "said"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96},
            {"tp": 4},
            ConfigError,
            "6 attention",
        ),
        ({}, {"tp": 65}, ConfigError, "--tp is 65"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    tmp_path: Path, difference: dict[str, int], settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        engine(tiny_folder(tmp_path, **difference), **settings)
    assert not torch.distributed.is_initialized()


def test_what_a_rank_finds_out_when_it_loads_is_refused(tmp_path: Path) -> None:
    folder = quantize(tiny_folder(tmp_path), "awq")
    with pytest.raises(CheckpointError, match="--tp 2 would cut groups"):
        engine(folder, tp=2, dtype="auto")
    assert not torch.distributed.is_initialized()


two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ON_CARDS = {"device": "cuda", "cache_gb": 0.5}


@pytest.mark.gpu
@two_cards
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM", "Qwen3ForCausalLM"])
def test_two_cards_answer_as_one(tmp_path: Path, architecture: str) -> None:
    """With graphs, all-reduces inside; twice, the second time out of the cache."""
    folder = tiny_folder(tmp_path, architecture)
    alone = answers_of(engine(folder, **ON_CARDS), requests())
    loaded = engine(folder, tp=2, **ON_CARDS)
    first = run_all(loaded.core, requests())
    together = answers_of(loaded, [request(10 + i, ids, max_new_tokens=10) for i, ids in PROMPTS.items()])
    check_equal(alone, first, decoder_of(folder), PROMPTS)
    check_equal(alone, {i - 10: answer for i, answer in together.items()}, decoder_of(folder), PROMPTS)


@pytest.mark.gpu
@two_cards
def test_many_rows_on_two_cards(tmp_path: Path) -> None:
    """Of 32 rows and more each rank chooses for its own; messages of several programs; the host tier beside them."""
    folder = tiny_folder(tmp_path, max_position_embeddings=512)
    settings = {**ON_CARDS, "max_batch_size": 48}
    prompts = {i: [1 + i, 5, 9, 7 + i] * (3 + i) for i in range(48)}
    asked = [request(i, ids, max_new_tokens=10) for i, ids in prompts.items()]
    alone = answers_of(engine(folder, **settings), asked)
    loaded = engine(folder, tp=2, cache_host_gb=0.1, **settings)
    group = loaded.core._executor._ranks.group  # type: ignore[attr-defined]
    if torch.cuda.can_device_access_peer(0, 1):
        assert group._memory is not None, "cards that reach each other's memory add up by the kernel"
    together = answers_of(loaded, asked)
    check_equal(alone, together, decoder_of(folder), prompts)


@pytest.mark.gpu
@two_cards
def test_four_bits_on_two_cards(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    folder = quantize(tiny_folder(tmp_path, **sizes), "awq")
    asked = [request(i, ids, max_new_tokens=10) for i, ids in PROMPTS.items()]
    settings = {**ON_CARDS, "dtype": "float16"}
    alone, together = answers_of(engine(folder, **settings), asked), answers_of(engine(folder, tp=2, **settings), asked)
    same = sum(a == b for i in alone for a, b in zip(alone[i], together[i], strict=True))
    assert same >= 0.8 * 10 * len(alone)  # half precision: where two are near, all that follows may differ


@pytest.mark.gpu
@two_cards
def test_a_card_whose_process_dies_is_no_hang(tmp_path: Path) -> None:
    loaded = engine(tiny_folder(tmp_path, max_position_embeddings=100_000), tp=2, session_len=90_000, **ON_CARDS)
    ranks = loaded.core._executor._ranks  # type: ignore[attr-defined]
    running, waiting = AsyncEngine(loaded.core), Waiting()
    running.submit(request(0, [1, 2, 3], max_new_tokens=80_000), waiting)
    assert waiting.begun.wait(60)
    os.kill(ranks.watch.handles[0].pid, signal.SIGKILL)
    assert waiting.over.wait(60), "nobody was told"
    assert "rank 1 of 2 has ended" in str(waiting.outputs[-1].error)
    running.close()
