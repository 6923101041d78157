"""What a run will need, said before it runs: memory on the device and the host, disk; the time comes from block 1."""

from dataclasses import dataclass

from lmtool.quant.groups import GROUPS
from lmtool.quant.layers import Blocks
from lmtool.quant.options import CalibrationOptions, QuantOptions

_FLOAT = 4
# of a Gram matrix: the sum, the symmetric one, the scaled one, and what factoring makes of it
_GRAMS_AT_ONCE = 4
# of the block's weights: themselves, scaled, rounded, and the codes
_WEIGHTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes. ``hidden`` is mapped from the work dir: the host's memory keeps of it what it can.

    notes: what is unusual about the files that will be written, a line each.
    """

    num_blocks: int
    blocks_done: int
    num_tokens: int
    device: int
    hidden: int
    disk: int
    output: int
    notes: tuple[str, ...] = ()


def plan_run(
    blocks: Blocks, calibration: CalibrationOptions, options: QuantOptions, num_tokens: int, blocks_done: int
) -> Plan:
    """num_tokens: of calibration text, 0 for plain rounding."""
    config = blocks.config
    weights = sum(linear.num_out * linear.num_in for group in GROUPS for linear in blocks.linears(0, group))
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    grams = _FLOAT * (sum(k * k for k in widths) + config.hidden_size**2 + (_GRAMS_AT_ONCE - 1) * max(widths) ** 2)
    rows = calibration.batch_size * calibration.seqlen
    activations = _FLOAT * rows * (3 * config.hidden_size + 3 * config.intermediate_size + config.qkv_size)
    hidden = _FLOAT * num_tokens * config.hidden_size
    output = int(weights * config.num_layers * options.bits_per_weight / 8) + 2 * sum(blocks.outer_names().values())
    if blocks.checkpoint.vision is not None:
        output += blocks.checkpoint.vision.num_bytes
    if options.head_bits == 8:  # beside a tied head, else instead of one in half precision
        output += config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else -1)
    return Plan(
        num_blocks=len(blocks),
        blocks_done=blocks_done,
        num_tokens=num_tokens,
        device=_WEIGHTS_AT_ONCE * _FLOAT * weights + (grams + activations if num_tokens else 0),
        hidden=2 * hidden,
        disk=2 * hidden + 2 * output,
        output=output,
        notes=options.notes,
    )
