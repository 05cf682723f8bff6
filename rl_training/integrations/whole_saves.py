"""Checkpoints of a plain trainer appear whole or not at all, as DrGRPOTrainer's do (rl_training.run.whole_checkpoint)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl_training.run.whole_checkpoint import remove_unfinished_checkpoints, saved_whole


def save_whole(trainer: Any, as_written: Any) -> None:
    """Let `trainer` save into `checkpoint-N.part`, renamed once it is complete.

    Args:
        as_written: the class's own `_save_checkpoint`. A trainer that saves otherwise is left alone: it may look for its files
            under their names.
    """
    if type(trainer)._save_checkpoint is not as_written or "_save_checkpoint" in vars(trainer):
        return
    save = trainer._save_checkpoint

    def saving(model: Any, trial: Any) -> None:
        with saved_whole(trainer):
            save(model, trial)
            trainer.accelerator.wait_for_everyone()

    trainer._save_checkpoint = saving


def remove_unfinished(trainer: Any) -> None:
    """Remove what a killed run was saving into the trainer's folder."""
    if trainer.accelerator.is_main_process:
        remove_unfinished_checkpoints(Path(trainer.args.output_dir))
