"""Every file of a checkpoint and of a results folder, damaged in every way; read by whatever reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.validation import examine_checkpoint
from entropy_experiments.records.folder_files import DATA
from entropy_experiments.records.reader import read_results_folder
from rl_training.run.resume import check_resumable
from rl_training.run.rollouts import read_rollouts
from tests.entropy_experiments.checkpoint_edits import reseal
from tests.faults.cases import EITHER, REFUSED, Case

SIDECAR = "entropy_experiments.json"


def _remade(write: Callable[[Path, bytes], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.unlink()
        write(path, content)

    return damage


def _flipped(content: bytes, place: float) -> bytes:
    at = min(int(len(content) * place), len(content) - 1)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: path.unlink(),
    "empty": _remade(lambda path, content: path.write_bytes(b"")),
    "cut in half": _remade(lambda path, content: path.write_bytes(content[: len(content) // 2])),
    "its last byte missing": _remade(lambda path, content: path.write_bytes(content[:-1])),
    "a byte too long": _remade(lambda path, content: path.write_bytes(content + b"\0")),
    "a bit flipped at its start": _remade(lambda path, content: path.write_bytes(_flipped(content, 0.02))),
    "a bit flipped in the middle": _remade(lambda path, content: path.write_bytes(_flipped(content, 0.5))),
    "a bit flipped at its end": _remade(lambda path, content: path.write_bytes(_flipped(content, 1.0))),
    "zeros": _remade(lambda path, content: path.write_bytes(bytes(len(content)))),
    "another file": _remade(lambda path, content: path.write_bytes(b"PK\3\4" + os.urandom(200))),
    "a folder": _remade(lambda path, content: path.mkdir()),
    "a pipe": _remade(lambda path, content: os.mkfifo(path)),
    "a device": _remade(lambda path, content: path.symlink_to("/dev/zero")),
    "a link to itself": _remade(lambda path, content: path.symlink_to(path)),
    "a link to nothing": _remade(lambda path, content: path.symlink_to(path.with_name("nothing"))),
}
# With fitting digests: what the validators alone must see.
RESEALED = ("empty", "cut in half", "zeros", "another file")
JSON_CONTENTS = {
    "a list": b"[]",
    "nothing": b"null",
    "deep": b"[" * 5000,
    "a huge number": b'{"global_step": 1' + b"0" * 5000 + b"}",
}
_UNREAD = ("README.md", "training_args.bin")


_WITH_WARNING = ("tokenizer", "special", "chat", "added", "vocab", "generation", "entropy_probe")
"""Files whose content may be legal, or is warned of by who reads it: a probe's averages begin anew."""


def checkpoint_cases(run: Path, step: int) -> Iterator[Case]:
    """run: a finished run of ours. Each case copies the checkpoint, damages one file and reads it as `doctor` or `train` do."""
    checkpoint = run / f"checkpoint-{step}"
    for name in sorted(path.name for path in checkpoint.iterdir() if path.is_file()):
        if name == "README.md":  # nothing is read from it
            continue
        for reader, read in _READERS.items():
            for what, damage in DAMAGES.items():
                act = _act(run, checkpoint.name, name, damage, read)
                yield Case(f"checkpoint, {reader}", f"{name}: {what}", act, _named(name))
            if name == SIDECAR or name in _UNREAD:
                continue
            must = EITHER if name.startswith(_WITH_WARNING) else REFUSED
            may_be_unread = EITHER if reader == "doctor" and name.startswith(("rng_state", "scaler")) else must
            may_be_unread = EITHER if reader == "resume" and "adapter" in name else may_be_unread
            for what in RESEALED:
                act = _act(run, checkpoint.name, name, DAMAGES[what], read, sealed=True)
                yield Case(f"checkpoint with its digests, {reader}", f"{name}: {what}", act, "", may_be_unread)
            for what, content in JSON_CONTENTS.items() if name.endswith(".json") else ():
                act = _act(run, checkpoint.name, name, writing(content), read, sealed=True)
                yield Case(f"checkpoint with its digests, {reader}", f"{name}: {what}", act, "", may_be_unread)


def rollout_cases(run: Path, step: int) -> Iterator[Case]:
    """The recorded sequences of a step."""
    path = f"rollouts/step-{step:06d}.parquet"
    for what, damage in DAMAGES.items():
        yield Case(
            "recorded sequences",
            f"{path}: {what}",
            _act(run, "", path, damage, lambda c: read_rollouts(c, step)),
            "step-",
        )


def results_cases(results: Path) -> Iterator[Case]:
    """A results folder of an analysis."""
    for name in (*DATA, "SHA256SUMS"):
        for what, damage in DAMAGES.items():
            gone = name == "SHA256SUMS" and what in (
                "gone",
                "empty",
                "a pipe",
                "a folder",
                "a device",
                "a link to itself",
                "a link to nothing",
            )
            yield Case(
                "results", f"{name}: {what}", _act(results, "", name, damage, read_results_folder),
                "" if name == "SHA256SUMS" else name.split(".")[0], EITHER if gone else REFUSED,
            )  # fmt: skip


def _named(name: str) -> str:
    stem = name.split(".")[0]
    return f"{stem}|adapter|token|weights|step|random" if name != SIDECAR else "entropy_experiments|sidecar|cut short"


def writing(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), path.write_bytes(content), None)[-1]


def _act(
    source: Path,
    inside: str,
    name: str,
    damage: Callable[[Path], None],
    read: Callable[[Path], Any],
    sealed: bool = False,
) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        copied = Path(shutil.copytree(source, folder / "copy", symlinks=True))
        damage(copied / inside / name)
        if sealed:
            reseal(copied / inside)
        read(copied / inside if inside else copied)

    return act


def _examine(checkpoint: Path) -> None:
    examine_checkpoint(checkpoint, local_files_only=True, read_weights=True).refuse(require_optimizer=True)


_READERS: dict[str, Callable[[Path], Any]] = {
    "doctor": _examine,
    "resume": lambda checkpoint: check_resumable(checkpoint, checkpoint.parent, 10**6),
}
