"""What can be refused before torch is imported: a folder that is absent or incomplete, a record that may not be trusted.

Importing torch and transformers takes seconds; a mistyped path should not. The same checks are made again where checkpoints
are loaded, for callers from Python. Imports neither, and a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entropy_experiments.buffers.recorded_task import refuse_distrusted
from entropy_experiments.checkpoints.folder import checkpoint_step, existing_folder, missing_parts, resolve_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.targets import name_runs, plan_sweep
from rl_training.errors import UserError
from rl_training.run.sidecar import read_sidecar


def refuse_checkpoint_early(checkpoint: Path, config: FisherAnalysisConfig, trust: bool) -> None:
    """Raises UserError where the folder holds no checkpoint, lacks a file, or names a task that wants --trust."""
    folder = resolve_checkpoint(checkpoint)
    refuse_distrusted(read_sidecar(folder), config, trust)
    checkpoint_step(folder)
    with_adam = config.entropy_analysis.fisher_kernel.preconditioning != "none"
    for line in missing_parts(folder):
        if with_adam or not line.startswith("optimizer.pt"):
            raise UserError(f"{folder} lacks {line}")


def refuse_sweep_early(runs: Sequence[Path], config: SweepConfig) -> None:
    """Raises UserError where a run folder is absent, or holds none of the checkpoints that are asked for."""
    plan_sweep(name_runs(runs), config)


def refuse_absent_folder(folder: Path) -> None:
    """Raises UserError where there is no such folder."""
    existing_folder(folder)
