"""Landlock for Linux 5.13 and later: this process and its children may read beneath some folders,
and touch no other file.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every machine
_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
# What each version of the interface can forbid about files: bits 0 to 12, then one more with
# versions 2, 3 and 5.
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


def restrict_to_reading(folders: Iterable[str]) -> bool:
    """From now on nothing but reading, and that only beneath `folders`.

    False, and nothing changed, where there is no Landlock.

    Needs no_new_privs to be set. From version 4 on no TCP either; from version 6 on no signal to a
    process outside.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if version < 1:
        return False
    files = (1 << _FILE_BITS.get(version, 16)) - 1
    fields = [files] + ([0b11] if version >= 4 else []) + ([0b11] if version >= 6 else [])
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for folder in folders:
            _allow_reading(libc, ruleset, folder)
        return libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow_reading(libc: ctypes.CDLL, ruleset: int, folder: str) -> None:
    try:
        place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # a folder that is not there needs no rule
    try:
        access = _READ_FILE | (_READ_FOLDER if os.path.isdir(folder) else 0)
        rule = struct.pack("=Qi", access, place)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)
