"""Request mixes as plain data: how many tokens go in and come out of each request, and seeded token ids for them.

The same seed gives the same mix on every machine. Knows no engine and no tensors.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lmtool.errors import ConfigError

Prompt = tuple[int, ...]

_LONGEST = 1024  # of prompt and of answer, in both chat mixes
_SHORTEST = 4
_MOST_TOKENS = 2048  # prompt + answer, ShareGPT's filter


@dataclass(frozen=True, slots=True)
class Size:
    """One request in tokens. Its first ``num_shared_tokens`` are those of every other request of the workload."""

    num_prompt_tokens: int
    num_new_tokens: int
    num_shared_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted all at once, in this order."""

    name: str
    sizes: tuple[Size, ...]

    @property
    def longest(self) -> int:
        """The most tokens, prompt and answer, of any request."""
        return max(size.num_tokens for size in self.sizes)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(size.num_prompt_tokens for size in self.sizes)

    @property
    def num_new_tokens(self) -> int:
        return sum(size.num_new_tokens for size in self.sizes)

    @property
    def shares_prefix(self) -> bool:
        return any(size.num_shared_tokens for size in self.sizes)

    def prompts(self, vocab_size: int, seed: int) -> list[Prompt]:
        """A prompt of random token ids for each request; another seed gives others, the shared part included."""
        random = np.random.default_rng(seed)
        shared = random.integers(vocab_size, size=max(size.num_shared_tokens for size in self.sizes))
        own = (random.integers(vocab_size, size=size.num_prompt_tokens - size.num_shared_tokens) for size in self.sizes)
        return [
            (*shared[: size.num_shared_tokens].tolist(), *ids.tolist())
            for size, ids in zip(self.sizes, own, strict=True)
        ]


# ---------------------------------------------------------------------- the mixes
def static(num_requests: int, input_len: int, output_len: int) -> Workload:
    """``num_requests`` equal ones: ``b16 128/256``."""
    return Workload(f"b{num_requests} {input_len}/{output_len}", (Size(input_len, output_len),) * num_requests)


def prefill(input_len: int) -> Workload:
    """One prompt and one token: the time to a first token and nothing else."""
    return Workload(f"prefill {input_len}", (Size(input_len, 1),))


def chat(num_requests: int = 1000, seed: int = 0) -> Workload:
    """Lognormal(4.6, 1.2) in and (4.9, 0.9) out, both clipped to 4…1024: `chat1000` of measured-h200.md."""
    random = np.random.default_rng(seed)
    inputs, outputs = (
        np.clip(random.lognormal(mean, sigma, num_requests).astype(int), _SHORTEST, _LONGEST).tolist()
        for mean, sigma in ((4.6, 1.2), (4.9, 0.9))
    )
    return Workload(f"chat{num_requests}", tuple(map(Size, inputs, outputs)))


def sharegpt(num_requests: int = 1000, seed: int = 0) -> Workload:
    """First turns of ShareGPT as a model: lognormal(5.05, 1.60) in, (5.00, 1.00) out; what its filter drops is redrawn.

    The filter is the one of vLLM, SGLang and LMDeploy: 4…1024 tokens in and out here, 2048 together.
    """
    random = np.random.default_rng(seed)
    sizes: list[Size] = []
    while len(sizes) < num_requests:
        size = Size(int(random.lognormal(5.05, 1.60)), int(random.lognormal(5.00, 1.00)))
        fits = all(_SHORTEST <= count <= _LONGEST for count in (size.num_prompt_tokens, size.num_new_tokens))
        if fits and size.num_tokens <= _MOST_TOKENS:
            sizes.append(size)
    return Workload(f"sharegpt{num_requests}", tuple(sizes))


def uniform(num_requests: int = 256, seed: int = 0) -> Workload:
    """100…1024 tokens in and out, each as likely: the mix of nano-vllm and mini-sglang."""
    drawn = np.random.default_rng(seed).integers(100, 1025, size=(num_requests, 2)).tolist()
    return Workload(f"uniform{num_requests}", tuple(Size(num_in, num_out) for num_in, num_out in drawn))


def shared_prefix(num_requests: int = 256, prefix_len: int = 2048, input_len: int = 128) -> Workload:
    """The same ``prefix_len`` tokens and then ``input_len`` own ones; 64 out."""
    size = Size(prefix_len + input_len, 64, num_shared_tokens=prefix_len)
    return Workload(f"shared-prefix{num_requests}", (size,) * num_requests)


def long_context(num_requests: int = 8, input_len: int = 32768) -> Workload:
    """Few requests with much behind them; 64 out."""
    return Workload(f"long-context{num_requests}", (Size(input_len, 64),) * num_requests)


MIXES: dict[str, Callable[..., Workload]] = {
    "chat": chat,
    "sharegpt": sharegpt,
    "uniform": uniform,
    "shared-prefix": shared_prefix,
    "long-context": long_context,
}


def mix(name: str, seed: int = 0) -> Workload:
    """A mix by name; digits behind it are the number of requests: ``chat``, ``chat1000``, ``sharegpt100``.

    Raises ConfigError for a name that is not there.
    """
    found = re.fullmatch(r"([a-z-]+?)(\d*)", name)
    make = MIXES.get(found[1]) if found else None
    if found is None or make is None or found[2].startswith("0"):
        raise ConfigError(
            f"--mix {name!r} is not known", f"give static, {', '.join(MIXES)}; a number of requests may follow: chat100"
        )
    if make in (chat, sharegpt, uniform):
        make = partial(make, seed=seed)
    return make(int(found[2])) if found[2] else make()
