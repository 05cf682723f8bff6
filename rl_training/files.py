"""Files that appear whole or not at all, and are never written through a link.

The one writer of the project. Content goes to a new file of a random name in the same folder,
created so that nothing that lies there is opened (O_EXCL), is flushed to the disk, and then takes
the name it is meant for. A symbolic link of that name is replaced, not followed. Folders that a
user names may be links; what lies inside them may not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rl_training.errors import UserError

PART = ".part"
"""Ends the name of a file that is being written: such a file is unfinished."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, to be filled; on leaving it is flushed and becomes `path`,
    on an error it is removed.
    """
    part = path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}{PART}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(part, flags, 0o666))
    try:
        yield part
        flush(part)
        rename_whole(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


_LEFT = re.compile(r"\..*\.[0-9a-f]{16}" + re.escape(PART))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing in a folder and below, once nobody writes there any
    more.
    """
    for path in folder.rglob(f".*{PART}"):
        if _LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, replacing one of this name. Text is UTF-8 with line ends as they are."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as part:
        part.write_bytes(data)


def write_whole_by(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, for writers that want a path: `write(part)` fills the file."""
    with replacing(path) as part:
        write(part)


def write_json_whole(path: Path, content: Any) -> None:
    """Write JSON as `write_whole` does; floats keep every bit.

    Raises:
        ValueError: for NaN and infinity, which are no JSON; nothing is written.
    """
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


COPY_AGAIN = "copy it again, or check its permissions"
LARGEST_JSON = 1 << 30
"""Bytes; a log of a million steps has as many."""


@contextlib.contextmanager
def opened_regular(path: Path, remedy: str = COPY_AGAIN) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises:
        UserError: for a pipe, a device, a socket or a folder, none of which is waited for, and for one that cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file but a folder, a pipe or a device: {remedy}")
    with os.fdopen(descriptor, "rb") as handle:
        yield handle


def read_regular(path: Path, limit: int = LARGEST_JSON, remedy: str = COPY_AGAIN) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises UserError as `opened_regular`, and for a larger one."""
    with opened_regular(path, remedy) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise UserError(
                f"{path} has {size:,} bytes, and no run writes more than {limit:,}: it is damaged; {remedy}"
            )
        return handle.read(limit + 1)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: ending in `remedy`, where the file is missing, unreadable or holds no object.
    """
    try:
        content = json.loads(read_regular(path, remedy=remedy).decode("utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object: {remedy}")
    return content


def rename_whole(part: Path, path: Path) -> None:
    """Give a finished file or folder its name, replacing a file of that name, and flush the name to
    the disk.

    After a power cut it has one name or the other. Both lie on one file system. A link called
    `path` is replaced, not followed.
    """
    os.replace(part, path)
    flush(path.parent)


def replace_folder(part: Path, folder: Path) -> None:
    """Give a finished folder its name, replacing a folder of that name, which a kill in between leaves beside it."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    rename_whole(part, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def link_to(existing: Path, path: Path) -> None:
    """`path` becomes another name of the file `existing`: a hard link, or on another file system a symbolic one."""
    try:
        os.link(existing, path)
    except OSError:  # another file system, or one without links
        path.symlink_to(existing)


def append_line(path: Path, line: str) -> None:
    """Append a line of text. Raises UserError where the file is a link."""
    refuse_link(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as handle:
        handle.write(line + "\n")


def own_folder(path: Path) -> Path:
    """Make a folder inside a folder of ours.

    Raises:
        UserError: a link of that name leads elsewhere.
    """
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def strange_files(folder: Path, ours: Collection[str]) -> list[str]:
    """What lies in a folder beside files of ours: other names, and in `figures` whatever is no picture; paths inside, sorted.

    Files that a killed process of ours was writing are not counted.
    """
    names = [path.name for path in folder.iterdir() if path.name not in ours and not _LEFT.fullmatch(path.name)]
    pictures = folder / "figures"
    inside = pictures.iterdir() if pictures.is_dir() and not pictures.is_symlink() else ()
    return sorted(names + [f"figures/{p.name}" for p in inside if p.suffix != ".png" and not _LEFT.fullmatch(p.name)])


def write_all_whole(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Write several files of a folder (names like "figures/a.png"): every one, or on a full disk none, and no folder for them."""
    made = [path for path in {(folder / name).parent for name in contents} if not path.exists()]
    try:
        with contextlib.ExitStack() as finished:
            for name, content in contents.items():
                own_folder((folder / name).parent)
                part = finished.enter_context(replacing(folder / name))
                part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
                flush(part)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # another process has written there meanwhile
                path.rmdir()
        raise


def refuse_link(path: Path) -> None:
    """Raises UserError where `path` is a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path} is a link to {os.readlink(path)}: nothing is written through it; remove it")


def refuse_links_inside(folder: Path) -> None:
    """Raises UserError where anything directly inside a folder that is about to be written to is a
    symbolic link.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        refuse_link(path)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
