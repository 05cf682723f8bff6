"""What of a sweep is done, on disk: several processes, and a later one after a kill, read it and agree.

<sweep>/sweep_plan.json                      runs, checkpoints and configuration, written first
<sweep>/config.yaml                          the configuration alone, replayable
<sweep>/checkpoints/<name>/                  a finished analysis; appears whole or not at all
<sweep>/checkpoints/<name>.source.json       which checkpoint it was made from, written before it
<sweep>/checkpoints/<name>.error.json        why it could not be analysed
<sweep>/sweep.json                           written last: a folder without it is an unfinished sweep

Locks are `flock`s, which a killed process lets go of. On file systems without them every process still keeps to its own shard.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entropy_experiments.checkpoints.files import fingerprint
from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.sweep.targets import Target
from rl_training.errors import UserError
from rl_training.files import own_folder, refuse_link, strange_files, write_json_whole
from rl_training.run.sums import SUMS_NAME

_OURS = frozenset(
    "sweep_plan.json config.yaml checkpoints sweep.json evolution.json results.parquet figures report.html locks".split()
) | {SUMS_NAME}


@dataclass(frozen=True)
class SweepFolder:
    """The paths of one sweep, and what is known of its checkpoints."""

    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / "sweep_plan.json"

    @property
    def sweep_file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def results(self, target: Target) -> Path:
        """Where the target's analysis lies once it is finished."""
        return self.checkpoints / target.name

    def _beside(self, target: Target, what: str) -> Path:
        return self.checkpoints / f"{target.name}.{what}"

    def _write_beside(self, target: Target, what: str, content: Any) -> None:
        path = self._beside(target, what)
        write_json_whole(own_folder(path.parent) / path.name, content)

    def error_of(self, target: Target) -> dict[str, Any] | None:
        """{"error", "kind", "time"} of a target that could not be analysed, None where there is no such news."""
        try:
            return json.loads(self._beside(target, "error.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write_error(self, target: Target, error: Exception) -> None:
        """Remember why a target could not be analysed."""
        what = " ".join(str(error).split()) or "no message"
        record = {"error": what, "kind": type(error).__name__, "time": time.time()}
        self._write_beside(target, "error.json", record)

    def clear_error(self, target: Target) -> None:
        """Forget it: the target is tried again, or done."""
        self._beside(target, "error.json").unlink(missing_ok=True)

    def outcome(self, target: Target) -> Literal["done", "failed", "open"]:
        """What became of the target."""
        if self.results(target).is_dir():
            return "done"
        return "open" if self.error_of(target) is None else "failed"

    def write_source(self, target: Target) -> None:
        """Say which checkpoint the analysis that follows is made from."""
        self._write_beside(target, "source.json", fingerprint(target.path))

    def require_same(self, target: Target, configuration: str) -> None:
        """Raises UserError unless the finished analysis of `target` is of this checkpoint and this configuration (as YAML)."""
        folder = self.results(target)
        remedy = f"choose another folder, remove {folder}, or redo the sweep with --overwrite"
        try:
            source = json.loads(self._beside(target, "source.json").read_text(encoding="utf-8"))
            used = (folder / "config.yaml").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} does not say what it was made from: {remedy}") from error
        if used != configuration:
            raise UserError(
                f"{folder} was analysed with another configuration ({_first_difference(used, configuration)}): {remedy}"
            )
        if source != fingerprint(target.path):
            raise UserError(
                f"{folder} was made from another {target.path.name} than the one in {target.path.parent}: {remedy}"
            )
        read_results_folder(folder)

    @contextmanager
    def locked(self, name: str, wait: bool) -> Iterator[bool]:
        """Whether the lock `name` is ours for the time of the block; not waiting, another live process may have it."""
        path = own_folder(self.path / "locks") / f"{name}.lock"
        refuse_link(path)
        with open(path, "a", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:  # this file system has no locks
                yield True
                return
            yield True

    def held(self, name: str) -> bool | None:
        """Whether a live process has the lock `name`; None where the file system has no locks."""
        path = self.path / "locks" / f"{name}.lock"
        refuse_link(path)
        try:
            with open(path, encoding="utf-8") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError) as error:
            return isinstance(error, BlockingIOError)
        except OSError:
            return None
        return False

    def remove(self) -> None:
        """Delete the sweep. Raises UserError where the folder is not one."""
        if self.path.exists() and not self.plan_file.exists():
            raise UserError(
                f"{self.path} is not the folder of a sweep (no sweep_plan.json): it is not replaced; choose another"
            )
        if self.path.exists():
            strange = strange_files(self.path, _OURS)
            if strange:
                raise UserError(
                    f"{self.path} holds {strange[0]}, which no sweep wrote: it is not replaced; move that away"
                )
            shutil.rmtree(self.path)

    def open_targets(self, targets: Sequence[Target]) -> list[Target]:
        """Those that are neither done nor known to have failed."""
        return [target for target in targets if self.outcome(target) == "open"]


def _first_difference(used: str, wanted: str) -> str:
    old, new = used.splitlines(), wanted.splitlines()
    for left, right in zip(old, new, strict=False):
        if left != right:
            return f"there {left.strip()}, now {right.strip()}"
    return "one has more keys than the other"
