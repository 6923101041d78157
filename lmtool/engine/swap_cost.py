"""Whether a beginning comes back sooner from the host or by computing it again. Both speeds are measured here."""

# a step's share of the figure fades to a half after about so many tokens
_MEMORY_TOKENS = 50_000.0


class SwapCost:
    """load_bytes_per_s: measured at the start, from pinned memory into the cache's own blocks."""

    def __init__(self, load_bytes_per_s: float, block_bytes: int) -> None:
        self._load_s = block_bytes / load_bytes_per_s if load_bytes_per_s > 0 else float("inf")
        self._tokens = 0.0
        self._seconds = 0.0

    def step_took(self, num_tokens: int, seconds: float) -> None:
        """A step with prompts in it. Large steps, which are what a long beginning is computed in, weigh most."""
        fade = 0.5 ** (num_tokens / _MEMORY_TOKENS)
        self._tokens = self._tokens * fade + num_tokens
        self._seconds = self._seconds * fade + seconds

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """None before the first step was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def prefers_load(self, num_blocks: int, num_tokens: int) -> bool:
        """num_blocks: to copy; num_tokens: to compute instead.

        Until a prompt was timed nothing is known of the other way, and blocks are loaded.
        """
        speed = self.prefill_tokens_per_s
        return speed is None or num_blocks * self._load_s < num_tokens / speed
