"""lm-eval's question (local-completions, multiple choice), and its way to read the answer: transformers' numbers."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lmtool.config import EngineConfig
from lmtool.engine.setup import load_engine
from tests.server.serving import Serving
from tests.server.support import EngineInThread, smollm2_tokenizer

CHOICES = {
    "The capital of France is": (" Paris", " Rome", " whale"),
    "Two plus two is": (" four", " seven", " of separation between the two sides"),
    "She opened the door and": (" walked in.", " the the the", " 12345"),
}
Row = tuple[list[int], int]  # ids of a context with a choice, and how many of them are the context's


@pytest.fixture(scope="module")
def peer() -> Any:
    """A small random Llama of transformers' own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def rows(peer) -> list[Row]:
    encode = smollm2_tokenizer().encode
    pairs = [(context, choice) for context, choices in CHOICES.items() for choice in choices]
    found = [(encode(context + choice), len(encode(context))) for context, choice in pairs]
    context = encode("What would it say?")  # and one that is the likeliest
    greedy = peer.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    return [*found, (greedy[0].tolist(), len(context))]


def by_transformers(peer: Any, rows: list[Row]) -> list[tuple[float, bool]]:
    found = []
    for ids, num_context in rows:
        with torch.inference_mode():
            logprobs = torch.log_softmax(peer(torch.tensor([ids])).logits[0, num_context - 1 : -1], dim=-1)
        targets = torch.tensor(ids[num_context:])
        chosen = logprobs.gather(1, targets[:, None]).sum()
        found.append((float(chosen), bool((logprobs.argmax(-1) == targets).all())))
    return found


def by_the_server(client: httpx.Client, rows: list[Row]) -> list[tuple[float, bool]]:
    body = {
        "prompt": [ids for ids, _ in rows],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
        "seed": 1,
    }
    choices = client.post("/v1/completions", json=body).json()["choices"]
    found = []
    for (ids, num_context), choice in zip(rows, choices, strict=True):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(ids) + 1  # and the token that was generated
        tokens, tops = told["tokens"][num_context:-1], told["top_logprobs"][num_context:-1]
        is_greedy = all(max(top, key=top.get) == token for token, top in zip(tokens, tops, strict=True))
        found.append((sum(told["token_logprobs"][num_context:-1]), is_greedy))
    return found


def test_log_likelihoods_are_those_of_transformers(peer, rows, tmp_path: Path):
    peer.save_pretrained(tmp_path)
    settings = EngineConfig(session_len=256, cache_gb=0.01, dtype="float32", device="cpu")
    engine = EngineInThread(load_engine(tmp_path, settings, None).core)
    with Serving(engine) as server, server.http() as client:
        found = by_the_server(client, rows)
    engine.close()
    expected = by_transformers(peer, rows)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [False] * 9 + [True]
