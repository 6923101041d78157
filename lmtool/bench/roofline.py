"""What a machine without any overhead would do: bytes and operations of a step, and a workload scheduled on that.

Kernels run one after another, and each takes as long as its bytes or its operations, whichever is longer: the matrices
first, then attention. Knows no torch and no real engine.
"""

from collections import deque
from dataclasses import dataclass

from lmtool.bench.runs import Run
from lmtool.bench.workloads import Size, Workload
from lmtool.models.config import ModelConfig

# how weights are stored → bytes of one weight in a layer, and in the output head
STORED_BYTES: dict[str, tuple[float, float]] = {
    "float32": (4, 4),
    "float16": (2, 2),
    "bfloat16": (2, 2),
    "int4": (4 / 8 + 4 / 32, 1),  # on a CPU: 4 bits, a 16-bit scale and zero per 32 weights; the head is 8-bit
    # on a GPU: a word for each group; the head stays in half precision
    **{f"w4a16 g{group_size}": (4 / 8 + 4 / group_size, 2) for group_size in (32, 64, 128)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """weight_bytes: read once a step. flops_per_pair: attention of one token to one token, all layers."""

    weight_bytes: float
    kv_bytes_per_token: float
    flops_per_token: float
    flops_per_logits: float
    flops_per_pair: float
    sliding_window: int = 0


@dataclass(slots=True)
class Work:
    """Bytes and floating-point operations of a step, or of several: of the matrices and of attention over the cache."""

    matrix_bytes: float = 0.0
    matrix_flops: float = 0.0
    attention_bytes: float = 0.0
    attention_flops: float = 0.0

    @property
    def num_bytes(self) -> float:
        return self.matrix_bytes + self.attention_bytes

    @property
    def flops(self) -> float:
        return self.matrix_flops + self.attention_flops

    def duration_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Of one step."""
        matrix_s = max(self.matrix_bytes / bytes_per_s, self.matrix_flops / flops_per_s)
        return matrix_s + max(self.attention_bytes / bytes_per_s, self.attention_flops / flops_per_s)

    def add(self, other: "Work") -> None:
        self.matrix_bytes += other.matrix_bytes
        self.matrix_flops += other.matrix_flops
        self.attention_bytes += other.attention_bytes
        self.attention_flops += other.attention_flops


def model_cost(model: ModelConfig, weights: str, kv_itemsize: float) -> Cost | None:
    """None where it is not known how many bytes such weights take. The embedding is looked up, not read."""
    if weights not in STORED_BYTES:
        return None
    layer_bytes, head_bytes = STORED_BYTES[weights]
    attention_size = model.num_heads * model.head_dim
    matrices = model.hidden_size * (model.qkv_size + attention_size + 3 * model.intermediate_size)
    head = model.vocab_size * model.hidden_size
    return Cost(
        weight_bytes=model.num_layers * matrices * layer_bytes + head * head_bytes,
        kv_bytes_per_token=2 * model.num_layers * model.num_kv_heads * model.head_dim * kv_itemsize,
        flops_per_token=2 * model.num_layers * matrices,
        flops_per_logits=2 * head,
        flops_per_pair=4 * model.num_layers * attention_size,
        sliding_window=model.sliding_window,
    )


def decode_step(cost: Cost, batch: int, context: int) -> Work:
    """One token for each of ``batch`` sequences of ``context`` tokens, the new one included."""
    work = Work(matrix_bytes=cost.weight_bytes)
    for _ in range(batch):
        _add_tokens(work, cost, context - 1, 1)
    work.matrix_flops += batch * cost.flops_per_logits
    return work


def _add_tokens(work: Work, cost: Cost, start: int, count: int) -> None:
    """``count`` tokens of one sequence behind ``start`` cached ones."""
    seen, pairs = start + count, count * start + count * (count + 1) // 2
    if cost.sliding_window:
        seen, pairs = min(seen, cost.sliding_window + count), min(pairs, count * cost.sliding_window)
    work.matrix_flops += count * cost.flops_per_token
    work.attention_bytes += seen * cost.kv_bytes_per_token
    work.attention_flops += pairs * cost.flops_per_pair


# ---------------------------------------------------------------------- a workload on the ideal machine
@dataclass(slots=True)
class _Sequence:
    request_id: int
    num_computed: int
    num_uncomputed: int
    num_left: int  # tokens still to come out


def ideal_run(
    workload: Workload,
    cost: Cost,
    bytes_per_s: float,
    flops_per_s: float,
    *,
    max_batch_size: int,
    max_batched_tokens: int,
) -> tuple[Run, Work]:
    """The workload under the engine's own policy (decodes first, then prompts under the token budget, memory for all).

    A shared prefix is computed once. Returns the run and all its bytes and operations.
    """
    run, total = Run(workload.num_prompt_tokens), Work()
    waiting = deque(_waiting(i, size) for i, size in enumerate(workload.sizes))
    running: list[_Sequence] = []
    while waiting or running:
        step, budget = Work(matrix_bytes=cost.weight_bytes), max_batched_tokens
        sampled: list[int] = []
        for sequence in sorted(running, key=lambda s: s.num_uncomputed > 1):  # stable: decodes first
            budget -= _compute(sequence, budget, cost, step, sampled)
        while waiting and budget > 0 and len(running) < max_batch_size:
            running.append(waiting.popleft())
            budget -= _compute(running[-1], budget, cost, step, sampled)
        step.matrix_flops += len(sampled) * cost.flops_per_logits
        run.record(run.duration_s + step.duration_s(bytes_per_s, flops_per_s), sampled)
        total.add(step)
        running = [sequence for sequence in running if sequence.num_left]
    return run, total


def _waiting(request_id: int, size: Size) -> _Sequence:
    cached = min(size.num_shared_tokens, size.num_prompt_tokens - 1) if request_id else 0
    return _Sequence(request_id, cached, size.num_prompt_tokens - cached, size.num_new_tokens)


def _compute(sequence: _Sequence, budget: int, cost: Cost, step: Work, sampled: list[int]) -> int:
    count = min(sequence.num_uncomputed, budget)
    _add_tokens(step, cost, sequence.num_computed, count)
    sequence.num_computed += count
    sequence.num_uncomputed -= count
    if sequence.num_uncomputed == 0:
        sampled.append(sequence.request_id)
        sequence.num_left -= 1
        sequence.num_uncomputed = 1
    return count
