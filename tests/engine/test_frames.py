"""Frames: whole messages out of bytes that come in any pieces, and nothing of what follows them."""

import socket
import threading

import msgspec
import pytest

from lmtool.engine.frames import Codec, Frames
from lmtool.engine.grammar_frames import Open, Order, Step

MESSAGES = [Open(1), Step(1, 300), Step(2, 70_000)]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_they_may_come_in_any_pieces(size: int) -> None:
    codec = Codec(Order)
    data = b"".join(map(codec.encode, MESSAGES))
    assert [one for i in range(0, len(data), size) for one in codec.feed(data[i : i + size])] == MESSAGES


def test_whoever_waits_reads_no_byte_beyond_its_message() -> None:
    """A socket is handed on behind a message, and files come along with single bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames = Frames(theirs, Order)
        ours.sendall(frames.codec.encode(MESSAGES[0]) + b"+")
        assert frames.receive() == MESSAGES[0]
        assert theirs.recv(10) == b"+"


def test_a_large_message_is_waited_for_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        large = bytes(range(256)) * (1 << 14)  # 4 MiB: no socket takes it at once
        sending = threading.Thread(target=Frames(ours, None).send, args=(large,))
        sending.start()
        assert Frames(theirs, bytes).receive() == large
        sending.join()


def test_what_ends_in_the_middle_or_is_too_long() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(b"\x05\x00\x00\x00abc")
        ours.close()
        with pytest.raises(EOFError):
            Frames(theirs, Order).receive()
    with pytest.raises(msgspec.MsgspecError, match="1000 bytes"):
        list(Codec(Order, most_bytes=999).feed((1000).to_bytes(4, "little")))
