"""Whether a run can go on from a checkpoint, and as itself: everything the Trainer would otherwise replace in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from rl_training.errors import UserError
from rl_training.run.checkpoint_digests import check_digests, check_nothing_added
from rl_training.run.folder_lock import holds_something
from rl_training.run.launched import world_size
from rl_training.run.rollouts import check_rollouts
from rl_training.run.sidecar import read_sidecar

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
    processes = world_size()
    if sidecar.rank_count != processes:
        raise UserError(
            f"{where}: {checkpoint} was trained by {sidecar.rank_count} process(es), this run has {processes}"
        )
    if not list(checkpoint.glob("rng_state*.pth")):
        raise UserError(
            f"{where}: {checkpoint} has no random states (rng_state*.pth); the run would go on as another one"
        )
    check_digests(checkpoint, sidecar.sha256)
    check_nothing_added(checkpoint, sidecar.sha256)
    check_rollouts(checkpoint.parent, sidecar.step, sidecar.rollouts_sha256)
    for path in [checkpoint / name for name in _NEEDED[1:]] + sorted(checkpoint.glob("rng_state*.pth")):
        _check_tensors(path)
    step = _step_of(checkpoint / "trainer_state.json")
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


def _step_of(path: Path) -> int:
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is damaged; copy it again") from error
    if type(step) is not int:
        raise UserError(f"{path} names no global_step: it is damaged; copy it again")
    return step


def _check_tensors(path: Path) -> None:
    """Raises UserError for a file that the Trainer would end on in the middle of its own loading; nothing in it is run."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file: copy the checkpoint again")
    try:
        with safe_globals():  # numpy's random state, and nothing else beside tensors, as the Trainer reads it
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file; each is the same news
        raise UserError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}): it is damaged, or holds objects that would have "
            "to be executed; copy it again, or resume from another checkpoint"
        ) from error


def _later(folder: Path, pattern: str, step: int) -> list[Path]:
    if not folder.exists():
        return []
    found = [(m, child) for child in folder.iterdir() if (m := re.fullmatch(pattern, child.name))]
    return sorted(child for m, child in found if int(m.group(1)) > step)
