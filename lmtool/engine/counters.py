"""What an engine has done: totals since it started."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """host_…: of the host tier; hits are found there, and copied back. host_copy_s: what copies took, either way."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_host_hit_blocks: int = 0
    num_host_hit_tokens: int = 0
    num_host_evictions: int = 0
    host_saved_bytes: int = 0
    host_loaded_bytes: int = 0
    host_copy_s: float = 0.0
