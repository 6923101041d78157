"""What an answer cost: tokens and times of one turn, and their sum. Knows neither engine nor terminal."""

from dataclasses import dataclass

from lmtool.chat.backend import Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStats:
    """Counts are tokens. ``num_cached_tokens`` is the part of the prompt whose K/V was already there."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    time_to_first_token_s: float | None = None
    duration_s: float | None = None

    @classmethod
    def of(cls, delta: Delta, *, first_s: float | None = None, duration_s: float | None = None) -> "TurnStats":
        """The counts of the last delta; its own times where it has them, else those measured outside."""
        return cls(
            num_prompt_tokens=delta.num_prompt_tokens,
            num_cached_tokens=delta.num_cached_tokens,
            num_generated_tokens=delta.num_generated_tokens,
            time_to_first_token_s=first_s if delta.time_to_first_token_s is None else delta.time_to_first_token_s,
            duration_s=duration_s if delta.duration_s is None else delta.duration_s,
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed: the tokens after the first one, over the time after the first one."""
        if self.duration_s is None or self.time_to_first_token_s is None or self.num_generated_tokens < 2:
            return None
        decode_s = self.duration_s - self.time_to_first_token_s
        return (self.num_generated_tokens - 1) / decode_s if decode_s > 0 else None

    def lines(self) -> list[str]:
        return [
            f"prompt      {self.num_prompt_tokens:,} tokens, {self.num_cached_tokens:,} of them cached",
            f"generated   {self.num_generated_tokens:,} tokens",
            f"first token {_number(self.time_to_first_token_s, 's')}",
            f"speed       {_number(self.tokens_per_s, 'tokens/s')}",
        ]


@dataclass(slots=True)
class Totals:
    """Sums over the turns of one run."""

    num_turns: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0

    def add(self, turn: TurnStats) -> None:
        self.num_turns += 1
        self.num_prompt_tokens += turn.num_prompt_tokens
        self.num_cached_tokens += turn.num_cached_tokens
        self.num_generated_tokens += turn.num_generated_tokens

    def line(self) -> str:
        answers = "1 answer" if self.num_turns == 1 else f"{self.num_turns} answers"
        return (
            f"total       {answers}, {self.num_prompt_tokens:,} prompt tokens "
            f"({self.num_cached_tokens:,} cached), {self.num_generated_tokens:,} generated"
        )


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"
