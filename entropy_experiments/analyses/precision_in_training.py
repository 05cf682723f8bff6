"""An analysis with what its run's precision adds to or takes from its numbers."""

from __future__ import annotations

from dataclasses import replace

from entropy_core.cut_weights import open_cut
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.checkpoints.folder import CheckpointRecord
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.step.training_precision import TrainedIn, training_precision


def with_training_precision(
    inputs: AnalysisInputs, record: CheckpointRecord, reporter: Reporter = SILENT
) -> AnalysisInputs:
    """As given where the run was trained in the analysis' own precision, is not recorded, or its model is cut over processes."""
    sidecar, estimand = record.sidecar, inputs.numbers.estimand
    trained_in = TrainedIn("float32", "no") if sidecar is None else TrainedIn(sidecar.dtype, sidecar.mixed_precision)
    if open_cut(inputs.model) is not None or not (trained_in.below or trained_in.moments_below(inputs.optimizer)):
        return inputs
    reporter.stage("precision of training")
    found = training_precision(
        inputs.model,
        inputs.optimizer,
        inputs.eval_batch,
        estimand.gradient,
        inputs.gradients[estimand.gradient],
        None if inputs.numbers.step is None else inputs.side.adam_step,
        trained_in,
        inputs.passes,
    )
    return replace(inputs, training_precision=found)
