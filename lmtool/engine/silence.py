"""Whoever says nothing is gone. The kernel asks whether the machine at the other end of a connection is there, whatever
its processes do; whether a process goes on, only it can say."""

import socket
import struct

_IDLE_S, _PROBE_S = 2, 2  # so long nothing, then are you there?, and so long until the next time
SILENT_S = 8  # a machine that says nothing for so long is not there any more
PRESENT_S = 2.0  # between two times that a process says that it is there
# A process that says nothing for so long stands still. Loading lets other threads speak, but for single tensors that
# come from a slow disk; a machine with too much to do, or one that is moved while it runs, is away for seconds.
STILL_S = 60.0
START_S = 600.0  # until it says it for the first time: Python and torch, from a disk that may be anywhere


def watch(connection: socket.socket, silent_s: int = SILENT_S) -> None:
    """Have the kernel end a TCP connection to a machine that is silent for so long, whoever was to speak."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, -(-silent_s // _PROBE_S))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * silent_s)


def expect_within(connection: socket.socket, limit_s: float) -> None:
    """From the next `recv` on, one that waits for longer raises BlockingIOError. Unlike `settimeout` this leaves `send`
    as it is, and costs no call of the system."""
    whole_s, part_s = divmod(limit_s, 1.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole_s), int(part_s * 1e6)))
