"""`Run`: the times of one run of a workload, real or ideal, and the rates that they amount to. Plain numbers."""

import statistics
from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Step:
    duration_s: float
    num_tokens: int  # that came out
    prefill: bool


@dataclass(slots=True)
class Run:
    """Steps in order. A step counts as prefill when some request gets its first token in it, or none gets any."""

    num_prompt_tokens: int
    steps: list[Step] = field(default_factory=list)
    first_token_s: dict[int, float] = field(default_factory=dict)  # request id → since the run began
    duration_s: float = 0.0

    def record(self, now_s: float, request_ids: Collection[int]) -> None:
        """A step ended ``now_s`` after the run began and gave each of these requests a token."""
        firsts = [i for i in request_ids if i not in self.first_token_s]
        self.first_token_s.update(dict.fromkeys(firsts, now_s))
        prefill = bool(firsts) or not request_ids
        self.steps.append(Step(now_s - self.duration_s, len(request_ids), prefill))
        self.duration_s = now_s

    @property
    def num_generated_tokens(self) -> int:
        return sum(step.num_tokens for step in self.steps)

    def decode_step_s(self) -> list[float]:
        return [step.duration_s for step in self.steps if not step.prefill]

    def metrics(self) -> dict[str, float]:
        """Rates per second and times in seconds. Where every step was prefill, only what prefill has.

        output_tokens_per_s, requests_per_s   over the whole run
        time_to_first_token_s                 median over the requests, from the run's beginning
        prefill_tokens_per_s                  prompt tokens over the prefill steps
        decode_tokens_per_s                   tokens of the other steps over their time
        """
        prefill_s = sum(step.duration_s for step in self.steps if step.prefill)
        found = {
            "time_to_first_token_s": statistics.median(self.first_token_s.values()),
            "prefill_tokens_per_s": self.num_prompt_tokens / prefill_s,
        }
        decode_s = sum(self.decode_step_s())
        if decode_s:
            num_decoded = sum(step.num_tokens for step in self.steps if not step.prefill)
            found |= {
                "output_tokens_per_s": self.num_generated_tokens / self.duration_s,
                "requests_per_s": len(self.first_token_s) / self.duration_s,
                "decode_tokens_per_s": num_decoded / decode_s,
            }
        return found
