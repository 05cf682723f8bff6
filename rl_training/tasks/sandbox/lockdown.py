"""What a process gives up before it meets a text that a policy wrote. There is no way back from any
of it.

    layer                  server (makes problems, forks)     completion (scores one text)          where
    no new privileges      yes                                inherited                             Linux
    Landlock               read installed packages alone      inherited                             Linux >= 5.13
    seccomp                no writing, network, programs,     also no fork, thread, alarm held up   Linux, x86-64 and ARM64
                           signals
    resource limits        no files, no core                  also memory, processor time           everywhere
    alarm                  -                                  ends at the time limit                everywhere
    audit hook             -                                  refuses what Python can name          everywhere

Without seccomp the audit hook and the resource limits remain, which a text that sets its mind to it
gets round.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import sysconfig
from contextlib import suppress

from rl_training.tasks.sandbox import landlock, seccomp

# Audit events that are refused by their first words; see the table of audit events in Python's own
# documentation.
_REFUSED = (
    "ctypes.",
    "fcntl.",
    "ftplib.",
    "glob.",
    "http.",
    "imaplib.",
    "mmap.",
    "nntplib.",
    "os.",
    "poplib.",
    "pty.",
    "resource.",
    "shutil.",
    "signal.",
    "smtplib.",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "syslog.",
    "telnetlib.",
    "tempfile.",
    "urllib.",
    "webbrowser.",
)
SERVER_MEMORY = 4 << 30
_NEEDED_BY_IMPORTS = frozenset({"os.listdir", "os.scandir", "os.putenv", "os.unsetenv"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def readable_folders() -> list[str]:
    """Standard library, installed packages, and what is imported already: beneath these lazy
    imports may still read.
    """
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    for name, module in list(sys.modules.items()):
        if "." not in name:
            folders.update(path for path in getattr(module, "__path__", ()) if os.path.isabs(path))
    # Shared libraries that an extension module asks the loader for, and time zones.
    folders.update(("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"))
    folders.add(os.path.join(sys.base_prefix, "lib"))
    return sorted(folders)


def enter_server(taken: int) -> list[str]:
    """Lock this process down before it makes problems.

    Returns the layers that hold, of landlock and seccomp.

    Args:
        taken: bytes that it has mapped; it may take SERVER_MEMORY beside them.
    """
    limits = [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, taken + SERVER_MEMORY)]
    for what, value in limits:
        with suppress(ValueError, OSError):  # a stricter limit holds already, or the platform has none of this kind
            resource.setrlimit(what, (value, value))
    if not seccomp.supported():
        return []
    folders = readable_folders()
    seccomp.die_with_parent()
    layers = []
    if seccomp.no_new_privileges() and landlock.restrict_to_reading(folders):
        layers.append("landlock")
    if seccomp.install(seccomp.server_filter()):
        layers.append("seccomp")
    return layers


def enter_completion(layers: list[str], keep: int, seconds: float, memory: int, taken: int) -> None:
    """Lock this freshly forked process down before it looks at a completion.

    Args:
        keep: the one descriptor it may write its result to, 3.
        seconds: after which the alarm ends it.
        memory: bytes that it may take beside `taken`, those its parent had mapped.
    """
    os.closerange(keep + 1, 1 << 16)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    processor = math.ceil(seconds) + 1
    for what, value in (
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_AS, taken + memory),
        (resource.RLIMIT_NOFILE, 64),
    ):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))
    if "seccomp" not in layers:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    seccomp.die_with_parent()
    if "seccomp" in layers and not seccomp.install(seccomp.completion_filter(reading="landlock" in layers)):
        os._exit(70)
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: no boundary by itself, but it stands where the operating system offers nothing
    better.
    """
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writing = isinstance(flags, int) and flags & _WRITING
        if writing or (isinstance(mode, str) and set(mode) & set("wax+")):
            raise PermissionError("a completion may not write files")
    elif event.startswith(_REFUSED) and event not in _NEEDED_BY_IMPORTS:
        raise PermissionError(f"a completion may not do this ({event})")
