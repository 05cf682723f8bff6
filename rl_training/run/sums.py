"""`SHA256SUMS`: digests of a folder's files, as `sha256sum -c` reads them. One flipped byte of a number is another number.

A folder that is written at once gets its list last (`write_sums`); one that grows gets a line with each file (`add_sum`), and the
last line of a name counts. Digests tell damage, not malice: whoever can change a file can change its line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from rl_training.errors import UserError
from rl_training.files import refuse_link, write_whole
from rl_training.run.checkpoint_digests import file_digest

SUMS_NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\0\r\n]{1,500})")


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the list of these files of `folder`, whole or not at all."""
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in sorted(names)]
    write_whole(folder / SUMS_NAME, "".join(lines))


def add_sum(path: Path) -> None:
    """Add a finished file to the list beside it. A line that a killed process left unfinished is taken off first."""
    listed = path.parent / SUMS_NAME
    refuse_link(listed)
    descriptor = os.open(listed, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.seek(whole)
        file.truncate()
        file.write(f"{file_digest(path)}  {path.name}\n".encode())


def check_sums(folder: Path, remedy: str) -> bool:
    """Compare every listed file of `folder` with its digest; False where there is no list.

    Raises:
        UserError: naming the file, ending in `remedy`, for one that differs or has gone, and for a list that is none.
    """
    recorded = _read(folder / SUMS_NAME, remedy, finished=True)
    for name, digest in sorted(recorded.items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / SUMS_NAME} names {name[:80]!r}, which is not inside the folder: {remedy}")
        if not path.is_file():
            raise UserError(f"{path} is gone, {SUMS_NAME} beside it names it: {remedy}")
        _compare(path, digest, remedy)
    return bool(recorded)


def check_sum(path: Path, remedy: str) -> bool:
    """Compare one file with its line in the list beside it; False where it has none. Raises UserError as `check_sums`."""
    digest = _read(path.parent / SUMS_NAME, remedy, finished=False).get(path.name)
    if digest is not None:
        _compare(path, digest, remedy)
    return digest is not None


def _compare(path: Path, digest: str, remedy: str) -> None:
    if file_digest(path) != digest:
        raise UserError(
            f"{path} is not the file that was written (its SHA-256 differs from that in {SUMS_NAME}): it is damaged or was "
            f"changed; {remedy}"
        )


def _read(listed: Path, remedy: str, finished: bool) -> dict[str, str]:
    """Name -> digest; {} where there is no list. finished: a last line without its end is damage, not one being written."""
    if not listed.is_file():
        return {}
    try:
        *lines, rest = listed.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listed} cannot be read ({error}): {remedy}") from error
    if rest and finished:
        lines.append(rest + " (cut short)")
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{listed}, line {number}, is no digest and name: it is damaged; {remedy}")
        found[match[2]] = match[1]
    return found
