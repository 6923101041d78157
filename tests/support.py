"""What several tests need: the rule by which two runs are equal, and small decoders to run."""

from collections.abc import Sequence

import torch

from lmtool.config import EngineConfig, GenerationConfig
from lmtool.engine.core import EngineCore, TokenOutput
from lmtool.engine.kv_cache import allocate_cache, block_bytes, outline_plan
from lmtool.engine.sequence import Request
from lmtool.engine.setup import build_core
from lmtool.layers.context import AttentionContext
from lmtool.models.config import ModelConfig, RopeConfig
from lmtool.models.decoder import Decoder
from lmtool.models.random import random_decoder

# two largest logits closer than this: the next token may differ (docs/design.md, "equal")
NEAR_TIE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=211,
    hidden_size=64,
    intermediate_size=112,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_positions=512,
    rope=RopeConfig(theta=10000.0, dim=16),
)


def tiny_decoder(config: ModelConfig = TINY, seed: int = 0) -> Decoder:
    return random_decoder(
        config, dtype=torch.float32, device=torch.device("cpu"), num_positions=config.max_positions, seed=seed
    )


def tiny_core(decoder: Decoder | None = None, *, num_blocks: int | None = None, **settings: object) -> EngineCore:
    """An engine core on the CPU; ``num_blocks`` bounds its cache."""
    decoder = decoder or tiny_decoder()
    settings = {"max_batch_size": 8, **settings}
    if num_blocks is not None:
        plan = outline_plan(EngineConfig(**settings), 0)  # type: ignore[arg-type]
        sizes = [block_bytes(decoder.config, decoder.dtype, scheme) for scheme in (plan.scheme, "int8")]
        settings["cache_gb"] = (num_blocks * sizes[0] + plan.num_open_blocks * sizes[1]) / (1 << 30)
    return build_core(decoder, EngineConfig(**settings))[0]  # type: ignore[arg-type]


def request(request_id: int, prompt_ids: Sequence[int], **settings: object) -> Request:
    settings = {"temperature": 0.0, "ignore_eos": True, **settings}
    stop_ids = frozenset(settings.get("stop_token_ids", ()))  # type: ignore[call-overload]
    bad_ids = settings.pop("bad_ids", ())
    after = settings.pop("after", None)
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        params=GenerationConfig(**settings),  # type: ignore[arg-type]
        stop_ids=stop_ids,
        seed=int(settings.get("seed") or 0),  # type: ignore[call-overload]
        bad_ids=bad_ids,  # type: ignore[arg-type]
        after=after,  # type: ignore[arg-type]
    )


def run_all(core: EngineCore, requests: Sequence[Request]) -> dict[int, list[int]]:
    """Submit all at once, step until idle; request id → the ids that came out."""
    for one in requests:
        core.add(one)
    answers: dict[int, list[int]] = {one.request_id: [] for one in requests}
    while core.has_work:
        collect(core.step(), answers)
    return answers


def collect(outputs: list[TokenOutput], answers: dict[int, list[int]]) -> None:
    for output in outputs:
        if output.error is not None:
            raise output.error
        if output.token_id is not None:
            answers[output.request_id].append(output.token_id)


def all_logits(
    decoder: Decoder, ids: Sequence[int], num_prefill: int | None = None, kv_dtype: str = "model"
) -> torch.Tensor:
    """Logits [len(ids), V] of one sequence through a paged cache: a prefill of ``num_prefill``, then decode steps."""
    num_prefill = num_prefill or len(ids)
    num_blocks = -(-len(ids) // 64)
    plan = outline_plan(EngineConfig(kv_dtype=kv_dtype), len(ids), num_blocks=num_blocks + 2, num_slots=1)
    caches = allocate_cache(plan, decoder.config, decoder.dtype, decoder.device, decoder.kv_parameters)
    table = torch.arange(num_blocks, 0, -1)  # backwards: blocks are neighbours only by chance
    positions = torch.arange(len(ids))
    slots = table[positions // 64] * 64 + positions % 64
    steps = [(0, num_prefill), *((i, i + 1) for i in range(num_prefill, len(ids)))]
    rows = []
    with torch.inference_mode():
        for first, last in steps:
            chunk = last - first > 1 or first == 0
            context = AttentionContext(
                num_decode=0 if chunk else 1,
                positions=positions[first:last],
                slots=slots[first:last],
                seq_lens=torch.tensor([last], dtype=torch.int32),
                block_tables=table[None].int(),
                seq_slots=torch.zeros(1, dtype=torch.int32),
                cu_seqlens_q=torch.tensor([0, last - first], dtype=torch.int32) if chunk else None,
                max_seqlen_q=last - first if chunk else 0,
            )
            rows.append(decoder.logits(decoder.forward(torch.tensor(ids[first:last]), context, caches)))
    return torch.cat(rows)


def check_greedy(answer: Sequence[int], logits: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Every id of ``answer`` is the argmax of its row of ``logits`` [n, V], up to the first near tie.

    Returns how many steps were compared; the caller says how many there must be.
    """
    top = torch.topk(logits.float(), 2)
    for step, token_id in enumerate(answer):
        if top.values[step, 0] - top.values[step, 1] < NEAR_TIE[dtype]:
            return step
        assert token_id == int(top.indices[step, 0]), f"step {step} of {len(answer)}"
    return len(answer)


def check_equal(
    first: dict[int, list[int]],
    second: dict[int, list[int]],
    decoder: Decoder,
    prompts: dict[int, Sequence[int]],
    kv_dtype: str = "model",
) -> None:
    """Two runs of the same requests are equal by the rule of docs/design.md: at least nine steps in ten compared."""
    compared = total = 0
    for request_id, answer in first.items():
        total += len(answer)
        if answer == second[request_id]:
            compared += len(answer)
            continue
        prompt = list(prompts[request_id])
        logits = all_logits(decoder, [*prompt, *answer], kv_dtype=kv_dtype)[len(prompt) - 1 : -1]
        steps = check_greedy(answer, logits)
        assert answer[:steps] == second[request_id][:steps]
        compared += steps
    assert total > 0
    assert compared >= 0.9 * total, f"only {compared} of {total} steps could be compared"
