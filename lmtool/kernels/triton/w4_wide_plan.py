"""Who computes what of a product by as many programs as a card holds at once: whole tiles, and the rest shared out.

Tiles of the result that make no whole wave of programs are divided along K. A tile's parts lie side by side in
neighbouring programs, and the result does not depend on which of them is first.
"""

from typing import NamedTuple

import triton
import triton.language as tl

_LEAST_UNITS = 4  # of a part: below, adding the parts up costs more than they save
_EVEN_UP_TO = 1.5  # times the time of an even share, for parts that end where tiles end


class Shares(NamedTuple):
    """Each of ``programs`` computes ``whole`` tiles, and of the ``rest`` a run of ``share`` units.

    A unit is 128 in features of one tile. ``pieces``: of a program, the most; ``parts``: of a tile, the most.
    """

    programs: int
    pieces: int
    whole: int
    rest: int
    share: int
    parts: int


def share_out(tiles: int, units: int, slots: int) -> Shares:
    """``tiles`` of ``units`` each for a card that holds ``slots`` programs at once."""
    whole, rest = divmod(tiles, slots)
    if rest == 0:
        return Shares(slots, whole, whole, 0, units, 1)
    ideal = max(rest * units / slots, min(_LEAST_UNITS, units))
    even = min((n for n in range(1, units + 1) if units % n == 0 and n >= ideal), default=units)
    share = even if even <= ideal * _EVEN_UP_TO else -(-rest * units // slots)
    parts = max(((tile + 1) * units - 1) // share - tile * units // share + 1 for tile in range(rest))
    pieces = whole + (1 if units % share == 0 else 2)
    return Shares(slots if whole else -(-rest * units // share), pieces, whole, rest, share, parts)


@triton.jit
def piece_of(s, program, programs, whole, rest, share, units):
    """Piece s of a program → its tile, first and last unit, which part of the tile it is, of how many; how many add up.

    An empty one (first unit = last) comes after all others. Parts add up each a stretch of the tile; a part whose
    program goes on to another piece does not: it would have to wait. So no program waits but for programs that follow.
    """
    tile = s * programs + program
    start = 0
    end = units
    part = 0
    parts = 1
    adding = 1
    if s >= whole:
        t = program * share // units + s - whole
        start = tl.maximum(program * share - t * units, 0)
        end = tl.minimum(tl.minimum((program + 1) * share, rest * units) - t * units, units)
        before = t * units // share
        last = ((t + 1) * units - 1) // share
        part = program - before
        parts = last - before + 1
        goes_on = tl.minimum((last + 1) * share, rest * units) > (t + 1) * units
        adding = parts - goes_on.to(tl.int32)
        tile = whole * programs + t
        if start >= end:
            tile = 0
            start = 0
            end = 0
    return tile, start, end, part, parts, adding
