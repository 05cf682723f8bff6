"""An analysis with what its run's precision adds to or takes from its numbers."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from entropy_core.cut_weights import open_cut
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.checkpoints.folder import CheckpointRecord
from entropy_experiments.checkpoints.half_precision import HALF, holds_exactly
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.step.training_precision import TrainedIn, training_precision


def with_training_precision(
    inputs: AnalysisInputs, record: CheckpointRecord, reporter: Reporter = SILENT
) -> AnalysisInputs:
    """As given where the run was trained in the analysis' own precision, or its model is cut over processes."""
    sidecar, estimand = record.sidecar, inputs.numbers.estimand
    trained_in = as_saved(inputs.model) if sidecar is None else TrainedIn(sidecar.dtype, sidecar.mixed_precision)
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


def as_saved(model: nn.Module) -> TrainedIn:
    """Of a checkpoint without a record: half precision where all weights of a model that is trained whole are values of it."""
    parameters = list(model.parameters())
    if all(parameter.requires_grad for parameter in parameters):
        for name in ("bfloat16", "float16"):
            if all(holds_exactly(parameter, HALF[name]) for parameter in parameters):
                return TrainedIn(name, "no")
    return TrainedIn("float32", "no")
