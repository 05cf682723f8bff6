"""SHA-256 of the files of a checkpoint: one flipped byte makes another policy, another step, another tokenizer or another run.

Taken by the trainer when it saves and compared by whoever loads: reading costs about a second a gigabyte each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from rl_training.errors import UserError
from rl_training.files import opened_regular

_LONGEST_NAME = 500
_KINDS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt")
_OF_READERS = ("*.md", "entropy_experiments.json", ".*")
"""Files that nothing is computed from; and the record itself."""


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with opened_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """Digest of each file by its path in the folder ("policy/adapter_model.safetensors"); of subfolders those with numbers."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink())
    paths = {path for place in inside for kind in _KINDS for path in place.glob(kind)}
    paths |= {p for p in folder.iterdir() if p.is_file() and not any(p.match(kind) for kind in _OF_READERS)}
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(paths)}


def holds_numbers(name: str) -> bool:
    """Whether a recorded file holds weights or the state of optimizer or schedule."""
    return any(Path(name).match(kind) for kind in _KINDS)


def check_digests(folder: Path, recorded: Mapping[str, str]) -> None:
    """Raises UserError, naming the file, where one is not as it was written, or has gone."""
    for name, digest in sorted(recorded.items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or len(name) > _LONGEST_NAME:
            raise UserError(f"the record of {folder} names {name[:80]!r}, which is no file in it: it was tampered with")
        if not path.is_file():
            raise UserError(f"{path} is gone: the checkpoint's own record names it; copy the checkpoint again")
        if file_digest(path) != digest:
            raise UserError(
                f"{path} is not the file that the trainer wrote (its SHA-256 differs from the record's): it is damaged or was "
                "changed; copy it again, or delete entropy_experiments.json to analyse it as a checkpoint of unknown making"
            )


def check_nothing_added(folder: Path, recorded: Mapping[str, str]) -> None:
    """Raises UserError for a file of weights or optimizer state that the record does not know."""
    strange = sorted(path.name for kind in _KINDS for path in folder.glob(kind) if path.name not in recorded)
    if recorded and strange:
        raise UserError(
            f"{folder / strange[0]} was put there after the checkpoint was written, and might be read in place of another file: "
            "remove it"
        )
