"""What both implementations agree on beside tensors' shapes: a decode step's rows and work list. Knows no device."""

from typing import NamedTuple

from torch import Tensor

# eight programs for each multiprocessor of the largest card in use (H200: 132)
_TARGET_PROGRAMS = 1056
_FEW_SEQUENCES = 4
# tokens: half as many programs are enough where more would have pieces shorter than this
LONG_PIECE = 512
# pieces start at multiples of this many tokens, so that no tile of keys is cut in two
PIECE_ALIGN = 64


class DecodePlan(NamedTuple):
    """A decode step's attention cut into pieces of about equal length, whatever the sequences' lengths.

    items     [W, 3] int32: (sequence, first token, end token) of each piece; sequence -1: nothing to do
    spans     [B, 2] int32: (first item, number of items) of each sequence; every sequence has at least one
    arrivals  [B, Hkv] int32 zeros: how many pieces of a sequence are done; kernels leave zeros behind
    """

    items: Tensor
    spans: Tensor
    arrivals: Tensor


def num_plan_items(batch_size: int, num_kv_heads: int) -> int:
    """W: the same for any lengths, so that one captured graph serves them all.

    Few sequences have half as many: items that nothing is left for are programs too, and what a token waits for.
    """
    programs = _TARGET_PROGRAMS if batch_size > _FEW_SEQUENCES else _TARGET_PROGRAMS // 2
    return batch_size + -(-programs // num_kv_heads)


def share_of_tokens(total: int, spare: int) -> int:
    """Tokens of a piece where ``spare`` items are left for cutting: total / spare fits always (docs/log.md)."""
    return max(-(-total // spare), min(-(-total // max(spare // 2, 1)), LONG_PIECE))


def shortest_piece(longest: int) -> int:
    """Tokens below which a piece of a sequence of ``longest`` tokens is not worth merging: 64·⌈√(longest / 64) / 3⌉.

    Time is pieces · merge + longest / pieces · tile, and a tile of 64 takes about nine merges (docs/log.md).
    """
    blocks = -(-longest // PIECE_ALIGN)
    return PIECE_ALIGN * (1 + sum(9 * n * n < blocks for n in range(1, 65)))


# rows of `longs` [4, S] int64: the state of each slot that a step changes, and its seed
TOKEN, POSITION, SEED, STEP = range(4)
# rows of `words` [4, S] int32: sampling parameters; three of them are the bits of a float32
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)


class StepRows(NamedTuple):
    """The rows of a decode step, gathered from their slots; a row without a slot has seq_len 0 and writes to block 0.

    ids, positions [B] int64: the token to compute and its place; seq_lens [B] int32: that place + 1; slots [B] int64:
    where its K and V go; tables [B, max_blocks] int32; the others [B] are `sample`'s.
    """

    ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    slots: Tensor
    tables: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    steps: Tensor

    @property
    def sampling(self) -> tuple[Tensor, ...]:
        """In the order of `sample`'s arguments after the logits."""
        return self[5:]


VECTOR_BYTES = 16  # `add_all_reduce_` takes whole ones


class Peers(NamedTuple):
    """Memory of each rank that all ranks of a machine write to, and what a rank counts: for `add_all_reduce_`.

    inboxes [size] int64: address of each rank's memory as this process sees it, 2 · size · most_bytes bytes that are
    all ones (0xFF) at first; calls [P] int32 zeros: how often each program ran; ended [1] int32: not 0 where nobody is
    to be waited for any more.
    """

    rank: int
    size: int
    most_bytes: int
    inboxes: Tensor
    calls: Tensor
    ended: Tensor

    def on_meta(self) -> "Peers":
        """The same for a rehearsal: nothing is there."""
        return self._replace(inboxes=self.inboxes.to("meta"), calls=self.calls.to("meta"), ended=self.ended.to("meta"))
