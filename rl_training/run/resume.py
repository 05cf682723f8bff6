"""Whether a run can go on from a checkpoint, and as itself: everything the Trainer would otherwise replace in silence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals

from rl_training.errors import UserError
from rl_training.run.checkpoint_digests import check_digests, check_nothing_added
from rl_training.run.folder_lock import holds_something
from rl_training.run.launched import world_size
from rl_training.run.optimizer_state import WITHOUT_IT, check_optimizer_state
from rl_training.run.rollouts import check_rollouts
from rl_training.run.sidecar import Sidecar, read_sidecar, refuse_special_file
from rl_training.run.trainer_files import (
    check_random_state,
    check_resumable_state,
    check_schedule,
    read_trainer_state_file,
)

_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
ELSEWHERE = "resume from another checkpoint"


def check_resumable(checkpoint: Path, output_dir: Path, steps: int) -> None:
    """Raises UserError unless training to `steps` can go on from `checkpoint` in `output_dir` without mixing two runs.

    Records of steps after the checkpoint, which are about to be made again, are removed.
    """
    where = "training.resume_from_checkpoint"
    if not checkpoint.is_dir():
        raise UserError(f"{where}: {checkpoint} is no folder: name a checkpoint of the run, RUN/checkpoint-N")
    for path in sorted(checkpoint.iterdir()):
        refuse_special_file(path)
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
    step = sidecar.step
    _check_files(checkpoint, sidecar)
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


def _check_files(checkpoint: Path, sidecar: Sidecar) -> None:
    """Every file that the Trainer reads, whatever the digests say: a file can have been wrong when it was written."""
    where = checkpoint / "trainer_state.json"
    check_resumable_state(where, read_trainer_state_file(where), sidecar.step)
    named = [len(names) for names in sidecar.optimizer_parameter_names]
    scaled = (checkpoint / "scaler.pt").exists()  # a loss scaler skips steps of the optimizer and of the schedule alike
    schedule = _read_tensors(checkpoint / "scheduler.pt")
    check_schedule(checkpoint / "scheduler.pt", schedule, [] if scaled else [sidecar.step], len(named))
    steps = [sidecar.step] + ([schedule["last_epoch"]] if scaled and "last_epoch" in schedule else [])
    path = checkpoint / "optimizer.pt"
    state = _read_tensors(path)
    try:
        check_optimizer_state(path, state, steps, sidecar.optimizer_class, path.name in sidecar.sha256)
    except UserError as error:  # its remedies are those of an analysis
        raise UserError(str(error).replace(WITHOUT_IT, ELSEWHERE)) from error
    entries = [len(group["params"]) for group in state["param_groups"]]
    if entries != named:
        raise UserError(
            f"{path} has {entries} parameters by group, the checkpoint's record names {named}: files of two checkpoints are "
            f"mixed; {ELSEWHERE}"
        )
    for path in sorted(checkpoint.glob("rng_state*.pth")):
        check_random_state(path, _read_tensors(path))


def _read_tensors(path: Path) -> Any:
    """Raises UserError for a file that the Trainer would end on in the middle of its own loading; nothing in it is run."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file: copy the checkpoint again")
    try:
        with safe_globals():  # numpy's random state, and nothing else beside tensors, as the Trainer reads it
            return torch.load(path, map_location="cpu", weights_only=True)
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
