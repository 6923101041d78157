"""How many tiles of pictures a step encodes. Ints only."""

from lmtool.engine.sequence import ImageRows, Sequence


def tiles_to_encode(images: list[ImageRows], *, joined: bool) -> int:
    """For these rows of a chunk. A picture in whose midst the step before has stopped is there: it was that step's."""
    return sum(rows.image.num_tiles for rows in images if joined or not rows.first)


def tokens_within(
    sequence: Sequence, start: int, count: int, num_tiles: int, most_tiles: int, *, joined: bool = False
) -> int:
    """How many of ``count`` tokens from ``start`` on it may compute beside ``num_tiles``: up to a picture that is too
    much for now. One that alone is more than ``most_tiles`` has a step to itself. joined: it starts in this step."""
    for rows in sequence.image_rows(start, start + count):
        more = tiles_to_encode([rows], joined=joined)
        num_tiles += more
        if more and num_tiles > max(most_tiles, more):
            return rows.at
    return count
