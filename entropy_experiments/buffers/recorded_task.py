"""The task of an analysis: the user's own, or the one that the checkpoint's record names as far as
a stranger may name it.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.folder import CheckpointRecord, read_trainer_state, resolve_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.config import BUILT_IN_REWARDS, TaskConfig
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from rl_training.run.sidecar import Sidecar, read_sidecar
from rl_training.tasks.trust import REMEDY, why_trust_is_needed


def task_of_analysis(sidecar: Sidecar | None, config: FisherAnalysisConfig, trust: bool) -> TaskConfig | None:
    """The configured task, else the record's; None where there is none and both buffers are files.

    Args:
        trust: what the user said of whoever made the checkpoint (`--trust`); nothing in a
            checkpoint can set it. Opens and imports nothing.

    Raises:
        UserError: the record names what it may not, or where there is no task and one is needed.
    """
    if config.checkpoint.task is not None:
        return config.checkpoint.task
    needed = _is_needed(config)
    if sidecar is None or sidecar.task is None:
        if needed:
            raise UserError(
                "the checkpoint does not say which task it was trained on: give checkpoint.task in the configuration"
            )
        return None
    if not needed and not trust and why_trust_is_needed(sidecar.task):
        return None
    refuse_distrusted(sidecar, config, trust)
    return validate_config(TaskConfig, sidecar.task, "the checkpoint's task")


def refuse_distrusted(sidecar: Sidecar | None, config: FisherAnalysisConfig, trust: bool) -> None:
    """Raises UserError where the analysis would take the record's task, and that names what a
    stranger may not name.
    """
    if trust or sidecar is None or sidecar.task is None or config.checkpoint.task is not None:
        return
    reason = why_trust_is_needed(sidecar.task)
    if reason is not None and _is_needed(config):
        raise UserError(f"the checkpoint's record names {reason}: {REMEDY}")


def check_trust(checkpoint_path: str | Path, config: FisherAnalysisConfig, trust: bool) -> None:
    """`refuse_distrusted` before anything is loaded.

    Other faults of the checkpoint are found when it is loaded.
    """
    try:
        sidecar = read_sidecar(resolve_checkpoint(checkpoint_path))
    except UserError:
        return
    refuse_distrusted(sidecar, config, trust)


def _is_needed(config: FisherAnalysisConfig) -> bool:
    sampling = config.entropy_analysis.sampling
    return not (sampling.eval_sequences_path and sampling.train_sequences_path)


def trainer_state_of(record: CheckpointRecord, task: TaskConfig | None) -> Any:
    """What TRL would hand a user's reward function as `trainer_state` in the step after the
    checkpoint; None without.
    """
    if task is None or task.reward in BUILT_IN_REWARDS or not (record.path / "trainer_state.json").exists():
        return None
    from transformers import TrainerState

    known, state = {f.name for f in fields(TrainerState) if f.init}, read_trainer_state(record.path)
    return TrainerState(**{name: value for name, value in state.items() if name in known - {"stateful_callbacks"}})
