"""A process that can do nothing but compute and use the files it has open: no other file, no network, no program.

The kernel's system call filter (seccomp, Linux 3.17 and later) lets a few calls through and refuses the rest, with
EPERM. It cannot be taken off again.
"""

import ctypes
import os
import platform
import struct

from lmtool.errors import DeviceError

_PR_SET_NO_NEW_PRIVS, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 38, 1, 1
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
_ARCH_AT, _NUMBER_AT = 4, 0  # in the kernel's struct seccomp_data

# reading and writing what is open, memory, time, threads' waiting, and leaving
_X86_64 = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60,
    "gettid": 186, "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228,
    "clock_nanosleep": 230, "exit_group": 231, "sigaltstack": 131, "getrandom": 318,
}  # fmt: skip
_ARM64 = {
    "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68,
    "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113,
    "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "getpid": 172, "gettid": 178, "brk": 214,
    "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
}  # fmt: skip
# AUDIT_ARCH_…, the number of seccomp itself, what is let through
_MACHINES = {"x86_64": (0xC000003E, 317, _X86_64), "aarch64": (0xC00000B7, 277, _ARM64)}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]  # noqa: RUF012  ctypes wants a list


def fence() -> None:
    """From here on, for all threads of this process. Raises DeviceError where the kernel has no such filter."""
    if platform.machine() not in _MACHINES:
        raise DeviceError(
            f"pickle files cannot be fenced off on {platform.machine()}", "convert them on x86-64 or 64-bit ARM"
        )
    arch, seccomp, allowed = _MACHINES[platform.machine()]
    program = _program(arch, allowed)
    code = ctypes.create_string_buffer(program)
    filter_ = _Program(len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(filter_)
    ):
        raise DeviceError(
            f"this kernel lets no process fence itself off: {os.strerror(ctypes.get_errno())}",
            "convert the pickle files on another machine",
        )


def _program(arch: int, allowed: dict[str, int]) -> bytes:
    numbers = sorted(allowed.values())
    lines = [
        (_LOAD_WORD, 0, 0, _ARCH_AT),
        (_JUMP_IF_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        # from call i it is len - i lines to the last, which allows
        *((_JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
