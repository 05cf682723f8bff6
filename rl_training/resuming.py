"""Whether a run can go on from a checkpoint, and as itself: everything the Trainer would otherwise replace in silence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from rl_training.checkpoint_format import read_sidecar
from rl_training.errors import UserError
from rl_training.folder_lock import holds_something

_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def check_resumable(checkpoint: Path, output_dir: Path, steps: int) -> None:
    """Raises UserError unless training to `steps` can go on from `checkpoint` in `output_dir` without mixing two runs.

    Records of steps after the checkpoint, which are about to be made again, are removed.
    """
    where = "training.resume_from_checkpoint"
    for name in _NEEDED:
        if not (checkpoint / name).exists():
            raise UserError(f"{where}: {checkpoint} has no {name}, so the run cannot go on from it as it was")
    sidecar = read_sidecar(checkpoint)
    if sidecar is None:
        raise UserError(
            f"{where}: {checkpoint} has no entropy_experiments.json: it is of another trainer, or was cut short while it was "
            "being saved; resume from another one"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if sidecar.rank_count != processes:
        raise UserError(
            f"{where}: {checkpoint} was trained by {sidecar.rank_count} process(es), this run has {processes}"
        )
    if not list(checkpoint.glob("rng_state*.pth")):
        raise UserError(
            f"{where}: {checkpoint} has no random states (rng_state*.pth); the run would go on as another one"
        )
    step = int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    if step >= steps:
        raise UserError(f"{where}: {checkpoint} has done {step} steps already; raise training.steps above that")
    if holds_something(output_dir) and checkpoint.resolve().parent != output_dir.resolve():
        raise UserError(
            f"training.output_dir {output_dir} holds another run: resume inside {checkpoint.parent}, or name an empty folder"
        )
    later = _later(output_dir, r"checkpoint-(\d+)", step)
    if later:
        raise UserError(
            f"{output_dir} holds {later[0].name}, which is later than {checkpoint.name}: move it away, or resume from it"
        )
    for path in _later(output_dir / "rollouts", r"step-(\d+)\.parquet", step):
        path.unlink(missing_ok=True)  # another process of the same run may have been here


def _later(folder: Path, pattern: str, step: int) -> list[Path]:
    if not folder.exists():
        return []
    found = [(m, child) for child in folder.iterdir() if (m := re.fullmatch(pattern, child.name))]
    return sorted(child for m, child in found if int(m.group(1)) > step)
