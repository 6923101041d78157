"""Connections to other machines: the kernel asks whether one is still there, whatever its processes do."""

import socket

_IDLE_S, _PROBE_S = 2, 2  # so long nothing, then are you there?, and so long until the next time
SILENT_S = 8  # a machine that says nothing for so long is not there any more


def watch(connection: socket.socket, silent_s: int = SILENT_S) -> None:
    """Have the kernel end a TCP connection to a machine that is silent for so long, whoever was to speak."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, -(-silent_s // _PROBE_S))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * silent_s)
