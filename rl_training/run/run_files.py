"""What a run writes into its folder: known by name, so that nothing else is ever removed, and begun only with the first step.

`config.yaml` appears when the first step is done. A run that is refused or fails before takes away again what it wrote; one that
was killed before leaves sequences without a configuration, which the next run removes.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rl_training.files import PART, refuse_link, remove_leftovers, write_whole
from rl_training.run.folder_lock import LOCK_NAME
from rl_training.run.sums import SUMS_NAME
from rl_training.run.whole_checkpoint import remove_unfinished_checkpoints

CONFIG_NAME = "config.yaml"
_RECORDS = {
    "rollouts": re.compile(r"step-\d+\.parquet"),
    "recorded_steps": re.compile(r"step-\d+\.parquet|run\.json"),
    "runs": re.compile(r".*"),  # TensorBoard's
}
_FILES = (CONFIG_NAME, "metrics.jsonl", "README.md", "entropy.png")


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, by step."""
    found = [(int(m[1]), p) for p in _children(folder) if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def is_begun(folder: Path) -> bool:
    """Whether a run in this folder has done a step."""
    return bool(checkpoints_of(folder)) or any((folder / name).exists() for name in (CONFIG_NAME, "metrics.jsonl"))


def not_of_a_run(folder: Path) -> list[str]:
    """What lies in a folder that no run wrote there, by its path inside."""
    strange = []
    for path in _children(folder):
        if path.name in _FILES or path.name == LOCK_NAME or _is_part(path.name):
            continue
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
            continue
        if path.name in _RECORDS and path.is_dir() and not path.is_symlink():
            known = _RECORDS[path.name]
            odd = (
                p
                for p in path.iterdir()
                if not known.fullmatch(p.name) and p.name != SUMS_NAME and not _is_part(p.name)
            )
            strange += [f"{path.name}/{p.name}" for p in odd]
        else:
            strange.append(path.name)
    return sorted(strange)


def remove_records(folder: Path) -> None:
    """Remove what a run without a checkpoint left, and nothing else. Raises UserError where a link lies in its place."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _RECORDS:
        refuse_link(folder / name)
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what killed processes were writing."""
    if folder.is_dir():
        remove_unfinished_checkpoints(folder)
        remove_leftovers(folder)


class ConfigFile(TrainerCallback):
    """Writes the configuration once a step is done. `done`: whether one is, in this process's run."""

    def __init__(self, path: Path, content: str) -> None:
        self.done = False
        self._path, self._content = path, content

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.done and state.is_world_process_zero:
            write_whole(self._path, self._content)
        self.done = True


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_part(name: str) -> bool:
    return name.endswith(PART) and (name.startswith(".") or name.startswith("checkpoint-"))
