"""What an analysis keeps while it runs, so that `--resume` goes on: `<folder>.part/work/`, removed when it is whole.

manifest.json   what the work belongs to: configuration, checkpoint, optimizer state, versions
buffers.json    both buffers as they were drawn
plan.json       how the kernel is computed
evaluation/, training/   finished blocks (entropy_experiments.kernel.workspace)
analyses/       results of finished analyses
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from entropy_experiments.checkpoints.files import fingerprint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import TrainingBuffer
from entropy_experiments.kernel.workspace import KernelWorkspace
from rl_training.errors import UserError
from rl_training.files import read_json_object, write_json_whole
from rl_training.run.disk import disk_errors_explained
from rl_training.sampling import CollectionCounts, Rollouts

FOLDER_NAME = "work"
_VERSIONS = ("torch", "transformers", "peft", "entropy-experiments")


class UnfinishedWork(KernelWorkspace):
    """The work folder inside `part`, the folder that becomes the results."""

    def __init__(self, part: Path) -> None:
        super().__init__(part / FOLDER_NAME)

    @property
    def begun(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.folder / f"{name}.json"
        with disk_errors_explained(path, "keeping what is finished"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_whole(path, dict(content))

    def kept(self, name: str) -> dict[str, Any] | None:
        """What `keep` wrote, None where it did not. Raises UserError where it is damaged."""
        path = self.folder / f"{name}.json"
        return read_json_object(path, "start anew with --overwrite") if path.exists() else None

    def keep_buffers(self, evaluation: Rollouts, training: TrainingBuffer) -> None:
        def numbers(values: torch.Tensor | None) -> list[float] | None:
            return None if values is None else values.double().tolist()

        content = {
            "evaluation": asdict(evaluation),
            "training": asdict(training.rollouts),
            "advantages": numbers(training.advantages),
            "weights": numbers(training.weights),
            "counts": asdict(training.counts),
        }
        try:
            self.keep("buffers", content)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            # A user's own task may carry rows that JSON does not know: they are drawn again from their seed.
            return

    def kept_buffers(self) -> tuple[Rollouts, TrainingBuffer] | None:
        """(evaluation, training) as they were drawn; None where they were not kept."""
        found = self.kept("buffers")
        if found is None:
            return None

        def numbers(values: list[float] | None) -> torch.Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.float64)

        training = TrainingBuffer(
            Rollouts(**found["training"]),
            numbers(found["advantages"]),
            numbers(found["weights"]),
            CollectionCounts(**found["counts"]),
        )
        return Rollouts(**found["evaluation"]), training


def describe_work(checkpoint: Path, config: FisherAnalysisConfig) -> dict[str, Any]:
    """What must be the same for unfinished work to be resumed: JSON-able, in the order in which differences are reported."""
    settings = config.model_dump(mode="json")
    return {
        "config": json.loads(json.dumps(settings)),
        "checkpoint": {"path": str(checkpoint.resolve()), **fingerprint(checkpoint)},
        "versions": {name: version(name) for name in _VERSIONS},
    }
