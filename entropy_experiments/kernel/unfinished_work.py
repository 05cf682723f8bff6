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

from entropy_experiments.checkpoints.files import fingerprint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import Buffers, TrainingBuffer
from entropy_experiments.kernel.workspace import KernelWorkspace
from rl_training.errors import UserError
from rl_training.files import read_json_object, write_json_whole
from rl_training.filtered_buffer import CollectionCounts
from rl_training.run.disk import disk_errors_explained
from rl_training.sampling import Rollouts
from rl_training.sequences import RolloutSequence

FOLDER_NAME = "work"
_LAYOUT = 2
"""Raised where blocks of the same analysis come to hold something else within a version."""
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

    def forget_plan(self) -> None:
        """No block is cut by the plan that was kept: another is made."""
        (self.folder / "plan.json").unlink(missing_ok=True)

    def keep_buffers(self, evaluation: Rollouts, training: TrainingBuffer) -> None:
        content = {
            "evaluation": [sequence.to_json() for sequence in evaluation],
            "training": [sequence.to_json() for sequence in training.rollouts],
            "counts": asdict(training.counts),
            "notes": list(training.notes),
        }
        try:
            self.keep("buffers", content)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            # A user's own task may carry rows that JSON does not know: they are drawn again from their seed.
            return

    def kept_buffers(self) -> Buffers | None:
        """As they were drawn; None where they were not kept. Raises UserError where they are damaged."""
        found = self.kept("buffers")
        if found is None:
            return None
        try:
            evaluation, training = (
                Rollouts(tuple(RolloutSequence.from_json(values) for values in found[name]))
                for name in ("evaluation", "training")
            )
            counts, notes = CollectionCounts(**found["counts"]), tuple(found["notes"])
            return Buffers(evaluation, TrainingBuffer(training, counts, notes))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder / 'buffers.json'} is damaged, or of another version: start anew with --overwrite"
            ) from error


def describe_work(checkpoint: Path, config: FisherAnalysisConfig) -> dict[str, Any]:
    """What must be the same for unfinished work to be resumed: JSON-able, in the order in which differences are reported."""
    settings = config.model_dump(mode="json")
    return {
        "config": json.loads(json.dumps(settings)),
        "checkpoint": {"path": str(checkpoint.resolve()), **fingerprint(checkpoint)},
        "versions": {name: version(name) for name in _VERSIONS},
        "layout of blocks": _LAYOUT,
    }
