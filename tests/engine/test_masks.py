"""What may come out of a step is what its mask allows, on every runner; a grammar of our own, no library."""

from random import Random

import numpy as np
import pytest
import torch

from lmtool.engine.constraint import Constraint
from lmtool.engine.core import EngineCore
from lmtool.models.decoder import Decoder
from tests.engine.fakes import LateGrammars
from tests.engine.test_device_runner import Late, device_core
from tests.support import check_equal, request, run_all, tiny_core, tiny_decoder

VOCAB = 211
ANY = {"type": "grammar", "grammar": "root ::= chain"}


def may_follow(told: list[int]) -> set[int]:
    """Three ids, which depend on the one before; the last of them is the last id that there is."""
    last = told[-1] if told else 0
    return {(7 * last + 1) % VOCAB, (11 * last + 5) % VOCAB, VOCAB - 1}


class Chain(LateGrammars):
    def poll(self, wait_s: float = 0.0) -> list[Constraint]:
        news = super().poll(wait_s)
        for constraint in news:
            bits = np.zeros(224, dtype=np.uint8)
            bits[list(may_follow(self.told[constraint]))] = 1
            bits[VOCAB:] = 1  # beyond the vocabulary: nobody reads these
            constraint.allowed = np.packbits(bits, bitorder="little").tobytes()
        return news


def check_masks(core: EngineCore, decoder: Decoder) -> None:
    """Greedy and drawn, with penalties and logprobs, beside free ones, which stay what they are."""
    random = Random(1)
    core._grammars = Chain(lambda: random.random() < 0.5)  # type: ignore[assignment]
    free = [request(i, [i] * (9 + 50 * i), max_new_tokens=40) for i in range(3)]
    bound = [
        request(10, [3] * 20, max_new_tokens=40, response_format=ANY),
        request(11, [3] * 70, max_new_tokens=40, response_format=ANY, temperature=1.5, seed=4),
        request(12, [3], max_new_tokens=40, response_format=ANY, temperature=1.0, seed=5, top_k=2, logprobs=5),
        request(13, [4] * 9, max_new_tokens=40, response_format=ANY, repetition_penalty=1.5, bad_ids=((VOCAB - 1,),)),
    ]
    answers = run_all(core, [*bound[:2], *free, *bound[2:]])
    expected = run_all(tiny_core(decoder), free)
    check_equal(expected, {i: answers[i] for i in expected}, decoder, {one.request_id: one.prompt_ids for one in free})
    for one in bound:
        answer = answers[one.request_id]
        assert len(answer) == 40
        assert all(token in may_follow(answer[:i]) for i, token in enumerate(answer))
    assert VOCAB - 1 not in answers[13]
    core.scheduler.blocks.check_integrity([])


@pytest.mark.parametrize("kind", ["plain", "device", "late", "short prompts padded"])
def test_only_what_is_allowed_comes_out(kind: str) -> None:
    decoder = tiny_decoder()
    if kind == "plain":
        check_masks(tiny_core(decoder), decoder)
    elif kind == "late":
        check_masks(device_core(decoder, Late), decoder)
    else:
        check_masks(device_core(decoder, padded=int(kind != "device")), decoder)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_on_a_gpu(cuda_graphs: bool) -> None:
    from tests.engine.test_graphs import gpu_core, gpu_decoder

    check_masks(gpu_core(gpu_decoder(torch.float32), cuda_graphs=cuda_graphs), tiny_decoder())
