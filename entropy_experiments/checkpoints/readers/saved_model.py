"""Folders of the Trainer with a plain `optimizer.pt` (AdamW of torch or of bitsandbytes), and of
save_pretrained without one.
"""

from __future__ import annotations

import re
from pathlib import Path

from entropy_experiments.checkpoints.readers.accelerate_fsdp import lazy_inside
from entropy_experiments.checkpoints.readers.adam_entries import adam_state
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from entropy_experiments.checkpoints.readers.trained_state import AdamState, TrainedState
from entropy_experiments.checkpoints.readers.trainer_files import schedule_beside, step_beside, weights_beside
from rl_training.errors import UserError

# An optimizer's state by other names than those that are read: torchtune's recipe_state, files of one's own.
_OTHER_STATES = re.compile(r"(recipe_state|optim|optimizer|training_state|trainer_state)\w*(\.(pt|pth|bin|ckpt|pkl))?")


def is_saved_model(folder: Path) -> bool:
    """Whether save_pretrained, of a model or an adapter, or the Trainer wrote it."""
    return (folder / "optimizer.pt").exists() or weights_beside(folder) is not None


def read_saved_model(folder: Path) -> TrainedState:
    """A checkpoint of the Trainer, or a saved model without optimizer (`preconditioning: none`).

    Raises:
        UserError: For files that are damaged, or an optimizer that is not AdamW.
    """
    path = folder / "optimizer.pt"
    adam = trainer_adam(path) if path.exists() else None
    step = step_beside(folder)
    return TrainedState(
        layout="HF Trainer" if adam is not None else "a saved model without optimizer",
        folder=folder,
        step=step if step is not None else (adam.step if adam else None),
        weights={},
        adam=adam,
        weights_folder=weights_beside(folder),
        scheduler=schedule_beside(folder),
        origins={"moments": "optimizer.pt"} if adam else {},
        notes=() if adam is not None else _unread(folder),
    )


def _unread(folder: Path) -> tuple[str, ...]:
    """What may be an optimizer's state, and is of no layout that is read."""
    found = sorted(path.name for path in folder.iterdir() if _OTHER_STATES.fullmatch(path.name))
    return tuple(f"{name} may hold the optimizer's state, and is of no layout that is read" for name in found[:3])


def trainer_adam(path: Path) -> AdamState:
    """The state of AdamW in an `optimizer.pt`, its parameters numbered."""
    content = read_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{path} is not the state of an optimizer of torch: it is damaged; copy it again")
    state = {
        key: {k: lazy_inside(path, v) for k, v in entry.items()} if isinstance(entry, dict) else entry
        for key, entry in content["state"].items()
    }
    return adam_state(path, {**content, "state": state})
