"""How a run starts in its folder: anew, or from one of its checkpoints; what is in the way is refused before any model loads."""

from __future__ import annotations

import warnings
from pathlib import Path

from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.errors import UserError
from rl_training.files import refuse_links_inside
from rl_training.run.folder_lock import holds_something
from rl_training.run.launched import is_first
from rl_training.run.resume import check_resumable
from rl_training.run.run_files import CONFIG_NAME, checkpoints_of, is_begun, not_of_a_run, remove_records, tidy
from rl_training.run.sidecar import read_sidecar

# What a checkpoint was made by. The rest may be other from there on: length, saving, reports, the probe, the device.
_OF_THE_RUN = ("model", "lora", "task", "rollouts", "training_buffer", "algorithm", "optimizer")
_FREE = ("device", "micro_batch_size", "reward_timeout", "reward_memory", "reward_process", "on_reward_error")


def find_start(config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from, None to begin. The folder's lock is held.

    Args:
        resume: Go on from the newest checkpoint of the folder; where it has none, begin anew, which is said.

    Returns:
        A checkpoint that was checked (rl_training.run.resume).

    Raises:
        UserError: where the folder holds something else, or another run, or the checkpoint is not one to go on from.
    """
    folder, named = Path(config.training.output_dir), config.training.resume_from_checkpoint
    refuse_links_inside(folder)
    if resume and named is not None:
        raise UserError(
            "--resume takes the newest checkpoint, training.resume_from_checkpoint names one: give one of them"
        )
    if is_first():
        tidy(folder)
    if named is not None:
        return _checked(Path(named), folder, config)
    if not holds_something(folder):
        return None
    strange, begun = not_of_a_run(folder), is_begun(folder)
    if resume and begun and checkpoints_of(folder):
        return _checked(checkpoints_of(folder)[-1], folder, config)
    if strange or (begun and not resume):
        what = f" (it holds {strange[0]})" if strange else ""
        advice = "" if strange else ", or go on with --resume"
        raise UserError(f"{folder} is not empty{what}: choose another training.output_dir{advice}")
    if is_first():
        warnings.warn(f"{folder}: a run was interrupted before its first checkpoint; it begins anew", stacklevel=3)
        remove_records(folder)
    return None


def is_done(config: TrainConfig) -> bool:
    """Whether the folder's newest checkpoint is that of the last step: a run that is resumed once more has nothing to do."""
    found = checkpoints_of(Path(config.training.output_dir))
    sidecar = read_sidecar(found[-1]) if found else None
    return sidecar is not None and sidecar.step == config.training.steps


def _checked(checkpoint: Path, folder: Path, config: TrainConfig) -> Path:
    check_resumable(checkpoint, folder, config.training.steps)
    _refuse_other_settings(checkpoint.parent / CONFIG_NAME, config)
    return checkpoint


def _refuse_other_settings(path: Path, config: TrainConfig) -> None:
    """Raises UserError where the run was configured otherwise in what its checkpoints hold; the first such key is named."""
    if not path.is_file():
        return
    before = load_config(TrainConfig, path)
    for section in _OF_THE_RUN:
        old, new = getattr(before, section).model_dump(mode="json"), getattr(config, section).model_dump(mode="json")
        for key in old:
            if old[key] != new[key] and key not in _FREE:
                raise UserError(
                    f"{section}.{key} was {str(old[key])[:80]} in this run ({path}), now it is {str(new[key])[:80]}: a run is "
                    "resumed with its own settings; begin another one for other settings"
                )
    if before.training.seed != config.training.seed:
        raise UserError(
            f"training.seed was {before.training.seed} in this run ({path}), now it is {config.training.seed}: a run is resumed "
            "with its own"
        )
