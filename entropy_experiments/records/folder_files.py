"""The files that an analysis leaves in its results folder: which have digests in `SHA256SUMS`, and what is ours to replace."""

from __future__ import annotations

import re
from pathlib import Path

from rl_training.files import PART
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
    ours = {*DATA, *_FOLDERS, SUMS_NAME, "report.html"}
    strange = [path.name for path in folder.iterdir() if path.name not in ours and not _unfinished(path.name)]
    pictures = folder / "figures"
    inside = pictures.iterdir() if pictures.is_dir() else ()
    return sorted(strange + [f"figures/{p.name}" for p in inside if p.suffix != ".png" and not _unfinished(p.name)])


def _unfinished(name: str) -> bool:
    return re.fullmatch(r"\..*" + re.escape(PART), name) is not None
