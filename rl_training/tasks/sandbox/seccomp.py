"""Seccomp filters for Linux: a list of system calls that go on, everything else answers EPERM.
Standard library alone.

Two filters, one inside the other. `server_filter` is for the process that makes a task's problems
and forks a child for each completion; `completion_filter` is for that child. Neither can open a
file for writing, make a socket, run a program, signal or inspect another process; the child cannot
fork either, nor hold up the alarm that ends it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from dataclasses import dataclass

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG, _FILTER_MODE = 22, 38, 1, 2
_SIGALRM = 14

# O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_APPEND and the bit of O_TMPFILE; equal on both machines.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, and CLONE_PTRACE, CLONE_PARENT.
_CLONE_MORE_THAN_FORK = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0xA000
)

_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "arm64": (0xC00000B7, 1)}

# name: (number on x86_64, number on aarch64); None where the machine has no such call.
_BOTH: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
}
_SERVER_TOO: dict[str, tuple[int | None, int | None]] = {
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "pipe": (22, None),
    "dup2": (33, None),
    "dup3": (292, 24),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "pipe2": (293, 59),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "seccomp": (317, 277),
}


@dataclass(frozen=True)
class _Condition:
    """A call that goes on only where an argument is right.

    Attributes:
        kind: "equals" (one of `values`), "not" (none of them), "without" (none of the bits of
            `values`).
    """

    numbers: tuple[int | None, int | None]
    argument: int
    kind: str
    values: tuple[int, ...]


_OPEN = (
    _Condition((257, 56), 2, "without", (_WRITING,)),  # openat
    _Condition((2, None), 1, "without", (_WRITING,)),  # open
)
_QUESTIONS = (
    _Condition((16, 29), 1, "equals", (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # ioctl: TCGETS ... FIOCLEX
    # fcntl: duplicate and flags; F_SETOWN would let the kernel send signals for us
    _Condition((72, 25), 1, "equals", (0, 1, 2, 3, 4, 1030)),
)
_FORK = (
    _Condition((56, 220), 0, "without", (_CLONE_MORE_THAN_FORK,)),  # clone
    _Condition((157, 167), 0, "equals", (_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS)),  # prctl
)
_LEAVE_THE_ALARM = (
    _Condition((13, 134), 0, "not", (_SIGALRM,)),  # rt_sigaction
    _Condition((302, 261), 2, "equals", (0,)),  # prlimit64: read a limit, set none
)
_CLONE3 = 435  # must answer ENOSYS, so that the C library falls back to clone


def supported() -> bool:
    """Whether filters are known for this machine; whether its kernel takes them, `install` finds
    out.
    """
    return sys.platform == "linux" and platform.machine() in _MACHINES and struct.calcsize("P") == 8


def server_filter() -> bytes:
    """The program for the process that forks a child for each completion."""
    return _program([*_BOTH.values(), *_SERVER_TOO.values()], [*_OPEN, *_QUESTIONS, *_FORK])


def completion_filter(reading: bool) -> bytes:
    """The program for the process that scores one completion.

    Args:
        reading: whether files may be opened for reading.
    """
    return _program(list(_BOTH.values()), [*(_OPEN if reading else ()), *_QUESTIONS, *_LEAVE_THE_ALARM])


def _program(calls: list[tuple[int | None, int | None]], conditions: list[_Condition]) -> bytes:
    architecture, column = _MACHINES[platform.machine()]
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    out: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        refuse,
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000),  # the x32 calls of x86_64, numbered from there on
        refuse,
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    for numbers in calls:
        if (number := numbers[column]) is not None:
            out += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for condition in conditions:
        if (number := condition.numbers[column]) is not None:
            body = _judge(condition)
            out += [(_JUMP_EQUAL, 0, len(body), number), *body]
    out.append(refuse)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in out)


def _judge(condition: _Condition) -> list[tuple[int, int, int, int]]:
    """Instructions that end in a verdict on the argument (its lower and upper 32 bits, little
    endian).
    """
    low = _ARGUMENTS + 8 * condition.argument
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    if condition.kind == "without":
        return [(_LOAD, 0, 0, low), (_JUMP_SET, 0, 1, condition.values[0]), refuse, allow]
    if condition.kind == "not":
        return [
            (_LOAD, 0, 0, low),
            *((_JUMP_EQUAL, len(condition.values) - place, 0, v) for place, v in enumerate(condition.values)),
            allow,
            refuse,
        ]
    body: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, low + 4), (_JUMP_EQUAL, 1, 0, 0), refuse, (_LOAD, 0, 0, low)]
    for value in condition.values:
        body += [(_JUMP_EQUAL, 0, 1, value), allow]
    return [*body, refuse]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def install(program: bytes) -> bool:
    """Put the filter on this process and all it will fork, for good.

    False where the kernel does not take it.
    """
    if not no_new_privileges():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    what = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p).value)
    return libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(what), 0, 0) == 0


def no_new_privileges() -> bool:
    """What both Landlock and a filter ask for first: no program that this process runs gains
    rights.
    """
    return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends (Linux)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
