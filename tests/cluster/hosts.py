"""Two machines that are network namespaces of this one: addresses of their own, a Ray node each, links that can be cut.

This machine is their client, at the bridge between them. Each has a folder of its own where Ray keeps what it knows.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.cluster.proxy import command_line
from tests.server.process import LMTOOL, TIMEOUT_S, until

RAY = str(Path(LMTOOL).with_name("ray"))
_PORT = 6379
_STORE = str(100 << 20)


def can_be_made() -> bool:
    """Whether this process may make namespaces, and links between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"lmtry{os.getpid() % 10_000}"
    made = [_try("netns", "add", name), _try("link", "add", name, "type", "bridge")]
    veth = _try("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
    _try("link", "del", name)
    _try("netns", "del", name)
    return all(made) and veth


class Hosts:
    """``with Hosts(folder) as hosts``; the first one is Ray's head. env: of `command`'s processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bridge = f"lmt{os.getpid() % 1_000_000}"
        self._net = f"10.231.{os.getpid() % 250}"
        self._rays: dict[int, subprocess.Popen[bytes]] = {}
        self.env = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def ray_address(self) -> str:
        return f"{self.address(1)}:{_PORT}"

    def address(self, number: int) -> str:
        return f"{self._net}.{number}"

    def command(self, number: int, *words: str) -> list[str]:
        """For a process on the host, with `env`."""
        own = self._folder / f"host{number}"
        own.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        script = f'mount --bind {own} /tmp/ray && exec "$@"'
        return ["ip", "netns", "exec", self._name(number), "sh", "-c", script, "sh", *words]

    def _name(self, number: int) -> str:
        return f"{self._bridge}-{number}"

    def cut(self, number: int) -> None:
        _ip("link", "set", self._name(number), "down")

    def mend(self, number: int) -> None:
        _ip("link", "set", self._name(number), "up")

    # ------------------------------------------------------------------ from the start to the end
    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._take_down)
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for number in (1, 2):
                self._add_host(number)
            self._start_ray(1, "--head", "--port", str(_PORT), "--include-dashboard=false")
            self._start_ray(2, "--address", self.ray_address)
            stack.pop_all()
        return self

    def _add_host(self, number: int) -> None:
        name = self._name(number)
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", self._bridge, "up")
        _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")

    def _start_ray(self, number: int, *flags: str) -> None:
        words = [RAY, "start", *flags, "--node-ip-address", self.address(number), "--num-cpus", "2"]
        words += ["--object-store-memory", _STORE]
        done = subprocess.run(
            self.command(number, *words), env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_down()

    def _take_down(self) -> None:
        for number in (1, 2):
            until(lambda number=number: not self._kill_all(number))
            _try("netns", "del", self._name(number))
            _try("link", "del", self._name(number))
        _try("link", "del", self._bridge)

    def processes(self, number: int) -> dict[int, str]:
        """Command lines of all that run there."""
        found = subprocess.run(["ip", "netns", "pids", self._name(number)], capture_output=True, text=True)
        return {int(pid): command_line(Path(f"/proc/{pid}")) for pid in found.stdout.split()}

    def _kill_all(self, number: int) -> list[int]:
        """Who there was."""
        pids = [*self.processes(number)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Skips where they cannot be made."""
    if not can_be_made():
        pytest.skip("needs network namespaces: root, and iproute2's ip")
    with Hosts(folder) as hosts:
        yield hosts


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


def _try(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0
