"""Conversations that take turns in a K/V cache of a quarter of their size, with a host tier behind it (issue 6).

python -m benchmarks.gpu_host_tier [--shape llama3-8b] [--conversations 64] [--tokens 8192] [--kv-dtype int8] [--probe]
Random weights, token ids in and out, greedy. Three engines over the same weights: one whose cache holds everything;
one with the host tier; the same with loading forbidden, so that what left the device is computed again.
"""

import argparse
import gc
import logging
import statistics
import time
from dataclasses import asdict, replace

import torch

from lmtool.bench.offline import greedy_requests
from lmtool.bench.shapes import find_shape
from lmtool.config import EngineConfig
from lmtool.engine.core import EngineCore
from lmtool.engine.device import choose_device, free_bytes
from lmtool.engine.kv_cache import BLOCK_SIZE, block_bytes
from lmtool.engine.parts import compile_steps
from lmtool.engine.setup import build_core
from lmtool.models.random import random_decoder

_GIB = 1 << 30
BAR = 0.35
ANSWER = 12
TURN = 100
Answers = dict[int, list[int]]


def probe_pinning() -> None:
    """Seconds for a GiB of pinned memory, two ways."""
    for _ in range(2):
        started = time.perf_counter()
        kept = torch.empty(_GIB, dtype=torch.uint8, pin_memory=True)
        pinned = time.perf_counter()
        plain = torch.empty(_GIB, dtype=torch.uint8).zero_()
        touched = time.perf_counter()
        result = torch.cuda.cudart().cudaHostRegister(plain.data_ptr(), _GIB, 0)
        registered = time.perf_counter()
        print(
            f"a GiB: torch's pinned memory {pinned - started:.2f} s; touched {touched - pinned:.2f} s"
            f" + registered {registered - touched:.2f} s ({result})",
            flush=True,
        )
        torch.cuda.cudart().cudaHostUnregister(plain.data_ptr())
        del kept


def grow_memory(num_bytes: int) -> None:
    """Some machines get their memory only as it is used."""
    cpu = torch.device("cpu")
    before = free_bytes(cpu)
    if before < num_bytes:
        started = time.perf_counter()
        used = [torch.empty(_GIB, dtype=torch.uint8).fill_(1) for _ in range(num_bytes // _GIB)]
        del used
        print(
            f"host memory grown from {before / _GIB:.0f} to {free_bytes(cpu) / _GIB:.0f} GiB"
            f" in {time.perf_counter() - started:.0f} s",
            flush=True,
        )


class Conversations:
    """Each one's tokens so far; a turn adds random ones and the answer that the first engine gave."""

    def __init__(self, count: int, num_tokens: int, vocab_size: int) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.vocab_size = vocab_size
        self.turns: list[list[list[int]]] = [[self.draw(num_tokens - ANSWER - i % 7) for i in range(count)]]

    def draw(self, count: int) -> list[int]:
        return torch.randint(0, self.vocab_size, (count,), generator=self.generator).tolist()

    def go_on(self, answers: list[list[int]]) -> None:
        self.turns.append([p + a + self.draw(TURN) for p, a in zip(self.turns[-1], answers, strict=True)])


def one_by_one(core: EngineCore, prompts: list[list[int]]) -> tuple[list[list[int]], list[float], float]:
    """(answers, seconds to each one's first token, seconds in all)."""
    answers, firsts = [], []
    started = time.perf_counter()
    for request in greedy_requests(prompts, [ANSWER] * len(prompts)):
        asked = time.perf_counter()
        core.add(request)
        answer: list[int] = []
        while core.has_work:
            for output in core.step():
                if not answer:
                    firsts.append(time.perf_counter() - asked)
                assert output.token_id is not None
                answer.append(output.token_id)
        answers.append(answer)
    return answers, firsts, time.perf_counter() - started


def all_at_once(core: EngineCore, prompts: list[list[int]]) -> tuple[list[list[int]], list[float], float]:
    started = time.perf_counter()
    answers: Answers = {}
    firsts = []
    for request in greedy_requests(prompts, [ANSWER] * len(prompts)):
        core.add(request)
        answers[request.request_id] = []
    while core.has_work:
        for output in core.step():
            if not answers[output.request_id]:
                firsts.append(time.perf_counter() - started)
            answers[output.request_id].append(output.token_id)
    return list(answers.values()), firsts, time.perf_counter() - started


def beside_decoding(core: EngineCore, decoding: list[list[int]], returning: list[int]) -> None:
    """What others' steps take before a conversation returns and while it does."""
    requests = greedy_requests([*decoding, returning], [200] * len(decoding) + [2])
    for request in requests[:-1]:
        core.add(request)
    while len(core.scheduler.running) < len(decoding) or core.scheduler.loads:
        core.step()
    times: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(30):
        core.step()
    for _ in range(40):
        started = time.perf_counter()
        core.step()
        times["alone"].append(time.perf_counter() - started)
    core.add(requests[-1])
    asked = time.perf_counter()
    core.step()
    arrived = None
    while arrived is None:
        started = time.perf_counter()
        outputs = core.step()
        times["beside"].append(time.perf_counter() - started)
        if any(output.request_id == requests[-1].request_id for output in outputs):
            arrived = time.perf_counter() - asked
    while core.has_work:
        core.step()
    loading = times["beside"][:-1]  # the last computes the turn
    print(
        f"{len(decoding)} decode beside a return: step {1e3 * statistics.median(times['alone']):.2f} ms before,"
        f" {len(loading)} steps meanwhile: median {1e3 * statistics.median(loading):.2f}, most"
        f" {1e3 * max(loading):.2f} ms; its first token after {1e3 * arrived:.0f} ms;"
        f" steps {[round(1e3 * seconds, 1) for seconds in times['beside'][:12]]}",
        flush=True,
    )


def ms(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return (
        f"median {1e3 * statistics.median(ordered):.1f}, least {1e3 * ordered[0]:.1f}, most {1e3 * ordered[-1]:.1f} ms"
    )


def equal(name: str, first: list[list[int]], second: list[list[int]]) -> None:
    tokens = sum(len(answer) for answer in first)
    same = sum(a == b for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))
    whole = sum(one == other for one, other in zip(first, second, strict=True))
    print(f"{name}: {whole} of {len(first)} answers equal, {same} of {tokens} tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kv-dtype")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--probe", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.probe:
        probe_pinning()
    device = choose_device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = find_shape(arguments.shape)
    longest = arguments.tokens + 2 * (TURN + ANSWER) + 200
    blocks_each = -(-longest // BLOCK_SIZE) + 1
    scheme = {"int8": "int8", "int4": "int4", "k8v4": "k8v4"}.get(arguments.kv_dtype)
    each_gb = blocks_each * block_bytes(model, dtype, scheme) / _GIB
    count = arguments.conversations
    general = {
        "device": arguments.device,
        "session_len": longest,
        "max_batch_size": count,
        "kv_dtype": arguments.kv_dtype,
        "dtype": str(dtype).removeprefix("torch."),
    }
    resident = EngineConfig(**general, cache_gb=1.02 * each_gb * count)
    tiered = EngineConfig(**general, cache_gb=each_gb * count / 4, cache_host_gb=1.02 * each_gb * count)
    print(f"{count} conversations of {each_gb:.2f} GiB, device pool {tiered.cache_gb:.1f} GiB of the whole", flush=True)
    if device.type == "cuda":
        grow_memory(int((each_gb * count * 1.2 + 4) * _GIB))
    few = replace(model, num_layers=2)
    outline = random_decoder(few, dtype=dtype, device=torch.device("meta"), num_positions=1)
    compiling = compile_steps(outline, resident, device) if device.type == "cuda" else None
    decoder = random_decoder(model, dtype=dtype, device=device, num_positions=longest)
    talk = Conversations(count, arguments.tokens, model.vocab_size)

    core, _ = build_core(decoder, resident, None, compiling)
    core.scheduler.blocks.keep_tails = False  # both engines compute the same chunks, so tokens must be the same
    one_by_one(core, [talk.draw(arguments.tokens), talk.draw(200)])
    resident_answers = []
    for turn in range(2):
        answers, firsts, seconds = one_by_one(core, talk.turns[turn])
        print(f"resident, turn {turn}: first token {ms(firsts)}; {seconds:.1f} s in all", flush=True)
        resident_answers.append(answers)
        talk.go_on(answers)
    answers, firsts, seconds = all_at_once(core, talk.turns[2])
    print(f"resident, all at once: first token {ms(firsts)}; {seconds:.2f} s in all", flush=True)
    resident_answers.append(answers)
    core.close()
    del core
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    started = time.perf_counter()
    core, _ = build_core(decoder, tiered, None, None)
    print(
        f"the engine with a host tier of {tiered.cache_host_gb:.1f} GiB is ready after"
        f" {time.perf_counter() - started:.1f} s",
        flush=True,
    )
    core.scheduler.blocks.keep_tails = False
    one_by_one(core, [talk.draw(arguments.tokens), talk.draw(200)])
    returning: list[float] = []
    for turn in range(2):
        before = asdict(core.scheduler.counters)
        answers, firsts, seconds = one_by_one(core, talk.turns[turn])
        after = asdict(core.scheduler.counters)
        print(f"host tier, turn {turn}: first token {ms(firsts)}; {seconds:.1f} s in all", flush=True)
        print("   ", {name: round(after[name] - before[name], 3) for name in after}, flush=True)
        equal(f"    turn {turn} beside resident", resident_answers[turn], answers)
        returning = firsts
    speed = core.scheduler.swap_cost.prefill_tokens_per_s or 0
    print(
        f"    prefill {speed:.0f} tokens/s, a block is loaded in {1e3 * core.scheduler.swap_cost._load_s:.3f} ms and"
        f" computed in {1e3 * BLOCK_SIZE / speed:.3f} ms",
        flush=True,
    )
    before = asdict(core.scheduler.counters)
    answers, firsts, seconds = all_at_once(core, talk.turns[2])
    after = asdict(core.scheduler.counters)
    print(f"host tier, all at once: first token {ms(firsts)}; {seconds:.2f} s in all", flush=True)
    print("   ", {name: round(after[name] - before[name], 3) for name in after}, flush=True)
    equal("    all at once beside resident", resident_answers[2], answers)
    beside_decoding(core, talk.turns[2][:4], talk.turns[2][20 % count])

    core.scheduler.swap_cost._load_s = float("inf")  # never cheaper: what left is computed again
    first = count // 8  # these have long left the device
    answers, firsts, _ = one_by_one(core, talk.turns[1][first : 2 * first])
    print(f"computed again: first token {ms(firsts)}", flush=True)
    equal("    computed again beside resident", resident_answers[1][first : 2 * first], answers)
    ratio = statistics.median(returning) / statistics.median(firsts)
    print(
        f"{'first bar' if ratio <= BAR else 'MISSED'}: a returning turn's first token after {ratio:.3f} of"
        f" computing it again (bar {BAR})",
        flush=True,
    )
    if device.type == "cuda":
        print(f"most device memory {torch.cuda.max_memory_reserved() / _GIB:.1f} GiB", flush=True)
    core.close()


if __name__ == "__main__":
    main()
