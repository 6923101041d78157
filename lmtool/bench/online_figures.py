"""What happened to each request of a server's benchmark, and the figures that all of them amount to. Plain numbers.

The definitions are those of vLLM's `bench serve`: TTFT from sending to the first text; ITL from one piece of text to
the next; end to end from sending to the last text; TPOT = (end to end - TTFT) / (tokens - 1). A request's clock starts
when it is sent, not when it waits for its turn under a limit of concurrency.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Outcome:
    """Of one request; seconds since the benchmark began. failure: its cause, in words; None: it was answered whole.

    text_s           when each piece of text came
    num_output_tokens  by the server's own count, or, where it gives none (``counted`` False), the pieces of text
    """

    sent_s: float
    text_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_output_tokens: int = 0
    counted: bool = False
    failure: str | None = None

    @property
    def time_to_first_token_s(self) -> float:
        return self.text_s[0] - self.sent_s

    @property
    def end_to_end_s(self) -> float:
        return self.text_s[-1] - self.sent_s

    @property
    def time_per_output_token_s(self) -> float | None:
        """None for an answer of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.end_to_end_s - self.time_to_first_token_s) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.text_s, self.text_s[1:], strict=False)]


def result(name: str, outcomes: Sequence[Outcome], duration_s: float, num_unfinished: int = 0) -> dict[str, Any]:
    """A result of a report. Rates are over ``duration_s``; requests that failed count in no other figure."""
    answered = [one for one in outcomes if one.failure is None]
    num_output = sum(one.num_output_tokens for one in answered)
    prompts = [one.num_prompt_tokens for one in answered if one.num_prompt_tokens is not None]
    metrics = {
        "requests_per_s": {"median": len(answered) / duration_s},
        "output_tokens_per_s": {"median": num_output / duration_s},
    }
    if answered and len(prompts) == len(answered):
        metrics["total_tokens_per_s"] = {"median": (num_output + sum(prompts)) / duration_s}
    times = {
        "time_to_first_token_s": [one.time_to_first_token_s for one in answered],
        "time_per_output_token_s": [t for one in answered if (t := one.time_per_output_token_s) is not None],
        "inter_token_latency_s": [gap for one in answered for gap in one.gaps_s],
        "end_to_end_s": [one.end_to_end_s for one in answered],
    }
    metrics |= {key: spread(values) for key, values in times.items() if values}
    return {
        "name": name,
        "metrics": metrics,
        "duration_s": duration_s,
        "num_requests": len(outcomes) + num_unfinished,
        "num_answered": len(answered),
        "num_unfinished": num_unfinished,
        "num_prompt_tokens": sum(prompts) if len(prompts) == len(answered) else None,
        "num_generated_tokens": num_output,
        "num_uncounted": sum(not one.counted for one in answered),
        "failures": dict(Counter(one.failure for one in outcomes if one.failure is not None).most_common()),
        "requests": [_row(one) for one in answered],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, median, p90, p99, least and most; between two values a percentile is their weighted mean."""
    _, *others = PERCENTILES
    median, *rest = (float(value) for value in np.percentile(values, PERCENTILES))
    names = (f"p{percent}" for percent in others)
    found = {"mean": float(np.mean(values)), "median": median, **dict(zip(names, rest, strict=True))}
    return {**found, "min": float(min(values)), "max": float(max(values))}


def _row(one: Outcome) -> dict[str, Any]:
    return {
        "sent_s": round(one.sent_s, 6),
        "time_to_first_token_s": round(one.time_to_first_token_s, 6),
        "end_to_end_s": round(one.end_to_end_s, 6),
        "num_prompt_tokens": one.num_prompt_tokens,
        "num_output_tokens": one.num_output_tokens,
    }
