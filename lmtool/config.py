"""What a user may set: `EngineConfig` for an engine, `GenerationConfig` for a request.

Frozen dataclasses of plain values; dtypes are strings here. Messages name the field as the flag is spelled.
Does not know torch, the command line or any model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Self, get_args, get_origin, get_type_hints

from lmtool.errors import ConfigError, RequestError

DTYPES = ("auto", "float16", "bfloat16", "float32")
QUANT_POLICIES = {0: "model", 8: "int8", 4: "int4"}
KV_DTYPES = ("model", "auto", "int8", "int4", "k8v4", "static")
_ONE_CHOICE = ("quant_policy", "kv_dtype")  # two names of it: who gives one means both
MODEL_FORMATS = ("hf", "awq", "gptq", "gguf", "lmtool")
MAX_LOGPROBS = 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # hosts that only this machine reaches


def split_address(
    address: str, flag: str = "--rank-hosts", wanted: str = "HOST:PORT, as `lmtool serve ranks` says it"
) -> tuple[str, int]:
    """Of HOST:PORT or [IPV6]:PORT. flag, wanted: for people. Raises ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != (host != bare) or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{flag}: {address!r} is no address", f"give {wanted}")
    return bare, int(port)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(ok: bool, name: str, value: object, wanted: str, error: type[ConfigError] | type[RequestError]) -> None:
    if not ok:
        raise error(f"{_flag(name)} is {value!r}", f"give {wanted}")


_NUMBERS: dict[Any, Any] = {int: Integral, float: Real}  # numpy's numbers are numbers too
_IN_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    NoneType: "None",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of whole numbers",
    Mapping[int, float]: "a mapping of token ids to numbers",
    Mapping[str, Any]: "a mapping with a type",
}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_types(config: Any, error: type[ConfigError] | type[RequestError]) -> None:
    """A value of a wrong type is refused here, where its name is known, and not by the engine's thread."""
    hints = _hints(config.__class__)
    for name in (one.name for one in fields(config) if one.init):
        value, hint = getattr(config, name), hints[name]
        if not _is_a(value, hint):
            words = (_IN_WORDS[kind] for kind in (get_args(hint) if hint not in _IN_WORDS else (hint,)))
            _check(False, name, value, " or ".join(words), error)


def _is_a(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, parts[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_is_a(k, parts[0]) and _is_a(v, parts[1]) for k, v in value.items())
    if parts:  # a union
        return any(_is_a(value, part) for part in parts)
    return isinstance(value, _NUMBERS.get(hint, hint)) and (hint is bool or not isinstance(value, bool))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine is set up.

    dtype                  'auto', 'float16', 'bfloat16', 'float32'; 'auto' on a CPU uses a GGUF's 4-bit weights
                           as they are
    device                 'auto', 'cpu', 'cuda', 'cuda:1', …
    model_format           'hf', 'awq', 'gptq', 'gguf' or 'lmtool' to insist on it; None: detected
    session_len            longest prompt + answer of one request, tokens; None: the model's own
    max_batch_size         most requests computed in one step
    max_batched_tokens     token budget of one step; longer prompts are prefilled in chunks of it. None: 8192 on a
                           GPU; 512 on a CPU, where a step takes long enough to be waited for by Ctrl-C
    max_image_tiles        tiles of pictures that one step encodes, so that many pictures do not hold up those who are
                           being answered; a picture with more has a step to itself. None: 16 on a GPU, 4 on a CPU
    cache_max_entry_count  share of the *free* device memory for the KV cache (GPU)
    cache_gb               size of the KV cache in GiB; on a CPU this is what bounds it
    cache_host_gb          host memory (pinned, on a GPU) for blocks of the KV cache that the device has no room for, in
                           GiB, all ranks together; they are copied back when their beginning comes again. 0: none
    quant_policy           the K/V cache: 0 as numbers, 8 int8, 4 int4 (what LMDeploy calls these)
    kv_dtype               the same by name: 'model', 'int8', 'int4', 'k8v4' (K in 8 bits, V in 4), 'static' (int8
                           with the parameters that `lite kv_qparams` wrote into a workspace), or 'auto': int8 where
                           a session of full length would not fit otherwise
    prefix_caching         share the K/V blocks of equal prompt beginnings
    cuda_graphs            capture the decode step once for each batch size (GPU); off: a slower engine starts faster
    tp                     ranks that share the model, each with a part of every matrix: GPUs, from ``device`` on
    rank_hosts             HOST:PORT of `lmtool serve ranks` on each other machine that takes an equal part of the ranks
    given                  names of what was passed: a workspace's engine.toml sets the others
    """

    dtype: str = "auto"
    device: str = "auto"
    model_format: str | None = None
    session_len: int | None = None
    max_batch_size: int = 256
    max_batched_tokens: int | None = None
    max_image_tiles: int | None = None
    cache_max_entry_count: float = 0.8
    cache_gb: float | None = None
    cache_host_gb: float = 0.0
    quant_policy: int = 0
    kv_dtype: str | None = None
    prefix_caching: bool = True
    cuda_graphs: bool = True
    tp: int = 1
    rank_hosts: tuple[str, ...] = ()
    given: frozenset[str] = field(init=False, repr=False, compare=False)

    def __new__(cls, **settings: Any) -> Self:
        self = object.__new__(cls)
        object.__setattr__(self, "given", frozenset(settings))
        return self

    def settings(self) -> dict[str, Any]:
        """Every setting by its name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def but(self, **settings: Any) -> Self:
        """With these given instead of what they are. Raises ConfigError for one that cannot be."""
        return type(self)(**{**{name: getattr(self, name) for name in self.given}, **settings})

    def under(self, settings: Mapping[str, Any]) -> Self:
        """With ``settings`` for what was not given. Raises ConfigError for one that cannot be."""
        if self.given & set(_ONE_CHOICE):
            settings = {name: value for name, value in settings.items() if name not in _ONE_CHOICE}
        return type(self)(**{**settings, **{name: getattr(self, name) for name in self.given}})

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, wanted: str) -> None:
            _check(ok, name, getattr(self, name), wanted, ConfigError)

        hosts: object = self.rank_hosts
        if isinstance(hosts, list):  # out of a file or a message
            object.__setattr__(self, "rank_hosts", tuple(hosts))
        _check_types(self, ConfigError)
        check(self.dtype in DTYPES, "dtype", "one of " + ", ".join(DTYPES))
        check(self.model_format in (None, *MODEL_FORMATS), "model_format", "one of " + ", ".join(MODEL_FORMATS))
        check(self.session_len is None or self.session_len >= 1, "session_len", "a number of tokens above 0")
        check(1 <= self.max_batch_size <= 4096, "max_batch_size", "a number from 1 to 4096")
        check(
            self.max_batched_tokens is None or self.max_batched_tokens >= 64, "max_batched_tokens", "at least 64 tokens"
        )
        check(self.max_image_tiles is None or self.max_image_tiles >= 1, "max_image_tiles", "at least 1")
        check(1 <= self.tp <= 64, "tp", "a number of GPUs from 1 to 64")
        self._check_rank_hosts()
        check(0 < self.cache_max_entry_count < 1, "cache_max_entry_count", "a share between 0 and 1")
        check(self.cache_gb is None or 0 < self.cache_gb < math.inf, "cache_gb", "a size in GiB above 0")
        check(0 <= self.cache_host_gb < math.inf, "cache_host_gb", "a size in GiB, or 0: no host memory")
        if self.cache_host_gb and not self.prefix_caching:
            check(False, "cache_host_gb", "0, or leave prefix_caching on: without it nothing is found again")
        check(self.quant_policy in QUANT_POLICIES, "quant_policy", "0 (off), 8 (int8) or 4 (int4)")
        check(self.kv_dtype in (None, *KV_DTYPES), "kv_dtype", "one of " + ", ".join(KV_DTYPES))
        named = QUANT_POLICIES[self.quant_policy]
        if self.kv_dtype is not None and self.quant_policy and self.kv_dtype != named:
            check(False, "kv_dtype", f"{named}, which is --quant-policy {self.quant_policy}, or leave one out")

    def _check_rank_hosts(self) -> None:
        for address in self.rank_hosts:
            split_address(address)
        if len(set(self.rank_hosts)) < len(self.rank_hosts):
            raise ConfigError("--rank-hosts names one twice", "give each once: it takes as many ranks as the others")
        if self.tp % self.num_machines:
            raise ConfigError(
                f"--tp {self.tp} cannot be shared out evenly among {self.num_machines} machines, this one and "
                f"{len(self.rank_hosts)} of --rank-hosts",
                f"give a --tp that {self.num_machines} divides",
            )

    @property
    def num_machines(self) -> int:
        return 1 + len(self.rank_hosts)

    @property
    def kv_choice(self) -> str:
        """One of `KV_DTYPES`, by whichever of the two names it was given."""
        return self.kv_dtype or QUANT_POLICIES[self.quant_policy]


# LMDeploy has two engines and a class for each; lmtool has one
TurbomindEngineConfig = EngineConfig
PytorchEngineConfig = EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How one answer is generated.

    max_new_tokens       None: up to the end of the context
    temperature          0: greedy, the default where the checkpoint recommends nothing
    top_k                0: off
    top_p, min_p         1 and 0: off
    repetition_penalty   1: off (over prompt and answer, as in the CTRL paper)
    presence_penalty, frequency_penalty   0: off (over the answer, as OpenAI documents them)
    seed                 None: a fresh one for each request
    logit_bias           token id -> added to its logit
    bad_words            texts that are never generated
    stop                 texts that end the answer; they are not part of it
    stop_token_ids       ids that end the answer, besides the model's own
    logprobs             how many alternatives to report for each token; None: none, 0: the chosen token only
    prompt_logprobs      the same for each token of the prompt after its first
    response_format      what the answer must be: {"type": "json_schema", …} and others (`engine/grammar_source.py`)
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("bad_words", "stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str | list | set | frozenset):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        _check_types(self, RequestError)

        def check(ok: bool, name: str, wanted: str) -> None:
            _check(ok, name, getattr(self, name), wanted, RequestError)

        def finite(name: str) -> bool:
            return math.isfinite(getattr(self, name))

        check(self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        check(self.min_new_tokens >= 0, "min_new_tokens", "0 or more")
        if self.max_new_tokens is not None:
            check(self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "at most --max-new-tokens")
        # what is nearly 0 makes numbers of logits that are none
        usable = self.temperature == 0 or 1e-6 <= self.temperature <= 100
        check(usable, "temperature", "0 (greedy), or a millionth to 100")
        check(self.top_k >= 0, "top_k", "0 (off) or more")
        check(0 < self.top_p <= 1, "top_p", "a number above 0, at most 1 (off)")
        check(0 <= self.min_p <= 1, "min_p", "a number from 0 (off) to 1")
        check(
            finite("repetition_penalty") and self.repetition_penalty > 0,
            "repetition_penalty",
            "above 0 (1: off)",
        )
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "a number from -2 to 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "a number from -2 to 2")
        check(self.seed is None or 0 <= self.seed < 2**63, "seed", "a whole number from 0 to 2**63 - 1")
        check(all(self.stop), "stop", "texts that are not empty")
        check(all(self.bad_words), "bad_words", "texts that are not empty")
        check(all(math.isfinite(v) for v in self.logit_bias.values()), "logit_bias", "finite numbers")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            check(number is None or 0 <= number <= MAX_LOGPROBS, name, f"0 to {MAX_LOGPROBS}")
