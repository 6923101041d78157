"""How ranks meet: on one machine at a file, on several at a port of the first rank. Knows no engine.

A file lies in a folder that only this user may enter. The port is open on the one interface that leads to the other
machines; that, and what the ranks then say to each other through gloo or NCCL, is as safe as the network is.
"""

import contextlib
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from fcntl import ioctl
from pathlib import Path

import torch
import torch.distributed
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from lmtool.engine.silence import SILENT_S, watch
from lmtool.errors import ConfigError, DeviceError
from lmtool.layers.group import TorchGroup

_TIMEOUT = timedelta(minutes=10)  # of what ranks wait for each other in, loading included
_JOIN_TIMEOUT = timedelta(minutes=1)  # they are all there when they join: nobody loads anything meanwhile
# later than the machines' own connections: what breaks then says less, and would have them wait for its answer
_SILENT_S = SILENT_S + 2
_REACH_TIMEOUT = timedelta(seconds=10)
_SIOCGIFCONF = 0x8912  # netdevice(7)
_IFREQ_BYTES = 40
_NAME_BYTES = 16
_MOST_ADDRESSES = 256
_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def file_store(path: Path, size: int) -> Store:
    """Where the ranks of one machine meet."""
    return FileStore(str(path), size)


def open_store(address: str) -> tuple[Store, int]:
    """The first rank's, at a free port of ``address`` → store, port."""
    with socket.create_server((address, 0), family=_family(address)) as listener:
        port = listener.getsockname()[1]
        store = TCPStore(
            address,
            port,
            is_master=True,
            timeout=_JOIN_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    return store, port


def find_store(address: str, port: int) -> Store:
    """The same for the other ranks. Raises ConfigError where it cannot be reached."""
    try:
        store = TCPStore(address, port, is_master=False, timeout=_REACH_TIMEOUT, wait_for_workers=False)
    except Exception as error:  # torch has several kinds
        raise ConfigError(
            f"the first rank at {address} port {port} cannot be reached",
            "let the machines reach each other on any port",
        ) from error
    store.set_timeout(_JOIN_TIMEOUT)
    return store


def join_group(
    store: Store | Path, rank: int, size: int, device: torch.device, address: str | None = None
) -> TorchGroup:
    """Be one of the ranks that meet at ``store``, all of which are there. address: of this machine towards the others,
    where there are several."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # of this thread, which need not be the one that loads
    # it names groups by how many this process has tried to make, and the others are to meet by the same name
    torch.distributed.distributed_c10d._world.group_count = 0
    hook, before = sys.excepthook, _connections()
    with _through(address) if address is not None else contextlib.nullcontext():
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=file_store(store, size) if isinstance(store, Path) else store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT if on_gpu else _JOIN_TIMEOUT,
            device_id=device if on_gpu else None,
        )
    sys.excepthook = hook  # torch's own would write "[rank0]" before every traceback, from now on
    if not on_gpu:
        torch.distributed.distributed_c10d._set_pg_timeout(_TIMEOUT)
    if address is not None:
        for fd in _connections() - before:
            _watch(fd)
    return TorchGroup(device, one_machine=address is None)


def device_of(card: int, num_cards: int, first: torch.device, tp: int) -> torch.device:
    """A machine's card ``card`` from ``first`` on. Raises DeviceError where there are not ``num_cards``."""
    if first.type == "cpu":
        return first
    index, count = (first.index or 0) + card, torch.cuda.device_count()
    if (first.index or 0) + num_cards > count:
        there = "there is 1" if count == 1 else f"there are {count}"
        asked = "1 GPU" if num_cards == 1 else f"{num_cards} GPUs"
        raise DeviceError(f"--tp {tp} asks for {asked} from {first} on, {there}", "give a smaller --tp")
    return torch.device("cuda", index)


def leave_group() -> None:
    """The others are gone: there is nobody to say goodbye to."""
    with contextlib.suppress(Exception):
        torch.distributed.distributed_c10d._abort_process_group()


def address_towards(connections: Sequence[socket.socket], hosts: Sequence[str]) -> str:
    """This machine's own on the network of the others. Raises ConfigError where they are on several."""
    found = {str(connection.getsockname()[0]) for connection in connections}
    if len(found) > 1:
        raise ConfigError(
            f"--rank-hosts {','.join(hosts)} are reached through several networks ({', '.join(sorted(found))})",
            "give addresses of one network that all machines are in",
        )
    return found.pop()


def interface_of(address: str) -> str:
    """The name of the network interface that has this address. Raises ConfigError where none has."""
    found = _ipv6_interfaces() if ":" in address else _ipv4_interfaces()
    name = found.get(address.partition("%")[0])
    if name is None:
        raise ConfigError(
            f"--rank-hosts: no network interface has the address {address}", f"set {_NAMES[0]} and {_NAMES[1]}"
        )
    return name


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def _through(address: str) -> Iterator[None]:
    """gloo and NCCL find other interfaces by themselves, which need not lead anywhere. What is set already stays."""
    ours = [name for name in _NAMES if name not in os.environ]
    if ours:
        os.environ.update(dict.fromkeys(ours, interface_of(address)))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _ipv4_interfaces() -> dict[str, str]:
    room = bytearray(_MOST_ADDRESSES * _IFREQ_BYTES)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        pointer = torch.frombuffer(room, dtype=torch.uint8).data_ptr()
        used, _ = struct.unpack("iL", ioctl(any_socket, _SIOCGIFCONF, struct.pack("iL", len(room), pointer)))
    found = {}
    for start in range(0, used, _IFREQ_BYTES):
        name = bytes(room[start : start + _NAME_BYTES]).split(b"\0")[0].decode()
        where = start + _NAME_BYTES + 4  # behind family and port
        found[socket.inet_ntoa(bytes(room[where : where + 4]))] = name.partition(":")[0]
    return found


def _ipv6_interfaces() -> dict[str, str]:
    found = {}
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        words = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))] = words[-1]
    return found


def _connections() -> set[int]:
    """Sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found


def _watch(fd: int) -> None:
    """gloo waits for ever for a machine that the network has lost, unless the kernel tells it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as one:
        if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
            watch(one, _SILENT_S)
