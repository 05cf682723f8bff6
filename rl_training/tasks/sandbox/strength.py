"""What of the sandbox does not hold on this machine: said once, or refused where
`ENTROPY_EXPERIMENTS_SANDBOX=require`.

The setting is an environment variable, for a machine has it or has not, and nothing that comes with
a task or a checkpoint may.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
from collections.abc import Sequence

from rl_training.errors import UserError

_logger = logging.getLogger(__name__)
SETTING = "ENTROPY_EXPERIMENTS_SANDBOX"
_WITHOUT_SECCOMP = (
    "no filter of system calls (seccomp): a completion or a chat template written for it could write files, reach the network, "
    "start programs and outlive its limits; only Python's audit hook and the limits of the process are left"
)
_WITHOUT_LANDLOCK = (
    "no Landlock: making a task's problems may read any file that you may read; completions and chat templates can open none, so "
    "that what imports a module late fails"
)
_REMEDY = (
    "run under Linux 5.13 or later on x86-64 or ARM64 (in a container, with its default seccomp profile), or set "
    f"{SETTING}=require to refuse what is not contained"
)


class SandboxRefused(UserError):
    """The sandbox lacks what the user requires of it."""


def is_required() -> bool:
    """Whether every layer is required. Raises UserError for a setting that is none."""
    setting = os.environ.get(SETTING, "warn")
    if setting not in ("warn", "require"):
        raise UserError(f"{SETTING}={setting!r} is no setting: write warn or require")
    return setting == "require"


def weakness(layers: Sequence[str]) -> str | None:
    """What is not contained with these layers; None where all hold."""
    if "seccomp" not in layers:
        return _WITHOUT_SECCOMP
    return None if "landlock" in layers else _WITHOUT_LANDLOCK


def check_layers(layers: Sequence[str]) -> None:
    """Say once what is not contained.

    Raises SandboxRefused where every layer is required and one is missing.
    """
    found = weakness(layers)
    if found is None:
        is_required()  # a misspelt setting is told on every machine
    elif is_required():
        raise SandboxRefused(
            f"the sandbox of this machine ({_machine()}) has {found}; {SETTING}=require refuses that: unset it, or run under "
            "Linux 5.13 or later on x86-64 or ARM64"
        )
    else:
        _warn_once(found)


@functools.cache
def _warn_once(found: str) -> None:
    _logger.warning("the sandbox of this machine (%s) has %s; %s", _machine(), found, _REMEDY)


def _machine() -> str:
    return f"{platform.system()} {platform.release()}, {platform.machine()}"
