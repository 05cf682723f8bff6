"""The files that an analysis leaves in its results folder: which have digests in `SHA256SUMS`, and what is ours to replace."""

from __future__ import annotations

from pathlib import Path

from rl_training.errors import UserError
from rl_training.files import strange_files
from rl_training.run.sums import SUMS_NAME

DATA = (
    "config.yaml",
    "evaluation_set.json",
    "kernel.safetensors",
    "leave_one_out.parquet",
    "run.json",
    "sequences.parquet",
    "summary.json",
    "training_history.json",
)
"""What the numbers stand in; the page and its pictures are drawn from them."""
_FOLDERS = ("figures", "gradients", "work")


def written_data(folder: Path) -> list[str]:
    """The names of `DATA` that are there."""
    return [name for name in DATA if (folder / name).is_file()]


def not_of_an_analysis(folder: Path) -> list[str]:
    """What lies in a results folder, finished or not, that no analysis wrote there, by its path inside."""
    return strange_files(folder, {*DATA, *_FOLDERS, SUMS_NAME, "report.html"})


def refuse_replacing(folder: Path) -> None:
    """Raises UserError where the folder that is to be replaced holds anything but an analysis, finished or not."""
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"{folder} is no folder of an analysis, so it is not overwritten: choose another output_dir")
    strange = not_of_an_analysis(folder)
    if strange:
        raise UserError(
            f"{folder} holds {strange[0]}, which no analysis wrote, so it is not overwritten: move that away"
        )
