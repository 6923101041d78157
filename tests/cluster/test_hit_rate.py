"""Prefix routing, through the real front to real engines whose caches are small, beside routing by chance."""

import contextlib
import random

import pytest

pytest.importorskip("aiohttp", reason="pip install '.[cluster]'")

from lmtool.cluster.routing import Policy, Router
from tests.cluster.front import KEY, Front, record
from tests.server.serving import Serving
from tests.server.support import tiny_engine

ASK = {"model": "one", "max_tokens": 1, "temperature": 0}


def hit_rate(policy: Policy) -> float:
    """The share of prompts' tokens that two engines had in their caches. One holds a quarter of the beginnings: of 24,
    each of three blocks and a bit, in 22 blocks. It is counted when who has what has settled."""
    chance, num_blocks, num_settling, num_counted = random.Random(7), 23, 36, 72
    words = ["lamp", "sea", "rock", "gull", "storm", "night", "rope", "boat", "fog", "bell", "salt", "tide", "shore"]
    beginnings = [f"{i} " + " ".join(chance.choices(words, k=210)) for i in range(24)]
    found = total = 0
    with contextlib.ExitStack() as stack:
        engines = [tiny_engine(num_blocks=num_blocks) for _ in "ab"]
        for engine in engines:
            stack.callback(engine.close)
        both = [stack.enter_context(Serving(one, model_names=("one",), api_keys=(KEY,))) for one in engines]
        front = stack.enter_context(Front("one", router=lambda: Router(policy, random.Random(5))))
        front.list(
            *(record(name, one.url, cache_tokens=(num_blocks - 1) * 64) for name, one in zip("ab", both, strict=True))
        )
        client = stack.enter_context(front.http())
        for number in range(num_settling + num_counted):
            text = chance.choice(beginnings) + f" {number}"
            usage = client.post("/v1/completions", json={**ASK, "prompt": text}).json()["usage"]
            if number >= num_settling:
                found += usage["prompt_tokens_details"]["cached_tokens"]
                total += usage["prompt_tokens"]
    print(f"{policy}: {found / total:.3f} of {total // num_counted} tokens a prompt")
    return found / total


def test_prefix_routing_finds_half_as_much_again_as_chance_in_real_caches() -> None:
    by_prefix, by_chance = hit_rate(Policy.PREFIX), hit_rate(Policy.RANDOM)
    assert by_prefix >= 1.5 * by_chance > 0
