"""What is expensive to make and only read: made once in a session of tests, by whichever process needs it first.

The workers of one session (pytest-xdist) share a folder that pytest makes anew for every session, so nothing is ever older
than the sources under test. Whoever comes first makes it under a lock, the others wait and read.
"""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this session, the same for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if own.name.startswith("popen-") else own  # as xdist names the folders of its workers


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What `make` returned, called once in a session with an empty folder that it may fill: unpickled, so free to be changed.

    The folder's content must not be changed: `changed_artefacts` finds it.
    """
    root = session_folder(tmp_path_factory) / "shared"
    root.mkdir(exist_ok=True)
    folder, pickled, listed = root / name, root / f"{name}.pickle", root / f"{name}.listed"
    with _locked(root / f"{name}.lock"):
        if not pickled.exists():
            folder.mkdir()  # where making it failed before, it fails again: half of it is not taken for the whole
            made = make(folder)
            listed.write_bytes(pickle.dumps(_listing(folder)))
            pickled.write_bytes(pickle.dumps(made))
        return pickle.loads(pickled.read_bytes())


def changed_artefacts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of files in shared folders that were added, removed or rewritten since they were made."""
    changed: list[str] = []
    for listed in sorted((session_folder(tmp_path_factory) / "shared").glob("*.listed")):
        before, after = pickle.loads(listed.read_bytes()), _listing(listed.with_suffix(""))
        changed += [path for path, _ in before ^ after]
    return sorted(set(changed))


def _listing(folder: Path) -> set[tuple[str, tuple[int, int]]]:
    """Every file with its size and the time of its last change, lock files left out."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {(str(path), (path.stat().st_size, path.stat().st_mtime_ns)) for path in files}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
