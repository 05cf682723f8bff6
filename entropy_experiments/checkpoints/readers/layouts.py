"""Which reader a folder is for, told by the names of its files; no file is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from entropy_experiments.checkpoints.foreign import RUN_FOLDERS, STEP_FOLDER
from entropy_experiments.checkpoints.readers.accelerate_fsdp import is_accelerate_fsdp, read_accelerate_fsdp
from entropy_experiments.checkpoints.readers.dcp_trees import dcp_tree_folder, read_dcp_tree, tree_in_two_folders
from entropy_experiments.checkpoints.readers.deepspeed_zero import read_zero
from entropy_experiments.checkpoints.readers.rank_files import rank_files_folder, read_rank_files
from entropy_experiments.checkpoints.readers.saved_model import is_saved_model, read_saved_model
from entropy_experiments.checkpoints.readers.trained_state import TrainedState
from entropy_experiments.checkpoints.readers.zero_files import zero_folder
from rl_training.errors import UserError

# Parts that mean nothing alone: the checkpoint is the folder they lie in.
_PARTS = ("pytorch_model_fsdp_0", "optimizer_0")
_BESIDE_RANKS = ("huggingface", "lora_adapter")


@dataclass(frozen=True)
class Source:
    """A checkpoint of a layout that is read. folder: As the user named it, or the step's. read:
    Opens it.
    """

    folder: Path
    read: Callable[[], TrainedState]


def find_source(folder: Path) -> Source | None:
    """The checkpoint in a folder; None where there is none of a layout that is read."""
    if not folder.is_dir():
        return None
    if folder.name in _PARTS or (folder.name in _BESIDE_RANKS and rank_files_folder(folder.parent) == folder.parent):
        folder = folder.parent
    if (folder / "optimizer.pt").exists():
        return Source(folder, lambda: read_saved_model(folder))
    ranked = rank_files_folder(folder)
    if ranked is not None:
        return Source(folder, lambda: read_rank_files(ranked))
    zero = zero_folder(folder)
    if zero is not None:
        beside = zero.parent if zero != folder and zero.name.startswith("global_step") else zero
        return Source(folder, lambda: read_zero(zero, beside))
    if is_accelerate_fsdp(folder):
        return Source(folder, lambda: read_accelerate_fsdp(folder))
    two = tree_in_two_folders(folder)
    if two is not None:
        return Source(folder, lambda: read_dcp_tree(*two))
    tree = dcp_tree_folder(folder)
    if tree is not None:
        return Source(folder, lambda: read_dcp_tree(tree))
    return Source(folder, lambda: read_saved_model(folder)) if is_saved_model(folder) else None


def find_sources(folder: Path) -> list[Source]:
    """The checkpoint in a folder or, of a run, all of them in the order of their steps.

    Raises:
        UserError: Where there is none.
    """
    one = find_source(folder)
    if one is not None and not _only_named_inside(folder):
        return [one]
    numbered = []
    for place in (folder / name for name in RUN_FOLDERS):
        for child in sorted(place.iterdir()) if place.is_dir() else []:
            matched = STEP_FOLDER.fullmatch(child.name)
            source = find_source(child) if matched else None
            if matched and source is not None:
                numbered.append((int(matched[1]), source))
    if numbered:
        return [source for _, source in sorted(numbered, key=lambda pair: pair[0])]
    if one is not None:
        return [one]
    raise UserError(
        f"{folder} is no checkpoint of a layout that is read (HF Trainer, accelerate, DeepSpeed, torch DCP, verl, SkyRL, "
        "save_pretrained), and no run that holds some: name the folder of one step"
    )


def _only_named_inside(folder: Path) -> bool:
    """Whether the folder is a run with a saved model beside its steps, as trainers leave it at the
    end.
    """
    names = [child.name for child in folder.iterdir() if child.is_dir()]
    steps = [name for name in names if re.fullmatch(r"checkpoint-\d{1,9}", name)]
    zero = [name for name in names if re.fullmatch(r"global_step\d{1,9}", name)]  # OpenRLHF keeps several in one folder
    return (
        (bool(steps) or len(zero) > 1)
        and not (folder / "trainer_state.json").exists()
        and not (folder / "optimizer.pt").exists()
    )
