"""The sockets at which a server is reached, and their address. They are open before anything is loaded."""

import socket

from lmtool.errors import ConfigError
from lmtool.server.config import ServerConfig


def bind(config: ServerConfig) -> list[socket.socket]:
    """A socket for each HTTP process, all at one address. Raises ConfigError where it is taken or not ours."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    several = config.num_http_processes > 1
    doors: list[socket.socket] = []
    port = config.port
    try:
        if several and port:  # sockets that share a port would share it with a server that is there already
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((config.host, port))
        for _ in range(config.num_http_processes):
            door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            doors.append(door)
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if several:
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            door.bind((config.host, port))
            port = door.getsockname()[1]
    except OSError as error:
        for door in doors:
            door.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {port}: {error.strerror or error}", "give another --server-port"
        ) from error
    return doors


def address_of(config: ServerConfig, door: socket.socket) -> str:
    host, port = door.getsockname()[:2]
    return f"{'https' if config.ssl_keyfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
