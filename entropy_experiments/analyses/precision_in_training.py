"""An analysis with what its run's precision adds to or takes from its numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from entropy_core.adamw import Moments
from entropy_core.cut_weights import open_cut
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.checkpoints.folder import CheckpointRecord
from entropy_experiments.checkpoints.half_precision import HALF, held_in
from entropy_experiments.checkpoints.stored_moments import StoredMoments
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.step.training_precision import TrainedIn, training_precision


def with_training_precision(
    inputs: AnalysisInputs, record: CheckpointRecord, reporter: Reporter = SILENT
) -> AnalysisInputs:
    """As given where the run was trained in the analysis' own precision."""
    sidecar, estimand = record.sidecar, inputs.numbers.estimand
    if sidecar is None:
        trained_in = as_saved(inputs.model, inputs.optimizer)
    else:
        trained_in = TrainedIn(sidecar.dtype, sidecar.mixed_precision)
    if trained_in.below or _moment_types(inputs.optimizer) & set(HALF.values()):  # else no pass is made
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
        recorded=sidecar is not None,
    )
    return replace(inputs, training_precision=found)


def as_saved(model: nn.Module, optimizer: Moments | None = None) -> TrainedIn:
    """Of a checkpoint without a record: half precision where all weights are values of it, and nothing shows that those which
    were trained had more digits: an adapter, or moments that are in half precision too. Else float32, of which nothing is known.
    """
    types = _moment_types(optimizer)
    finer, adapter = bool(types - set(HALF.values())), hasattr(model, "peft_config")
    if open_cut(model) is not None or finer or (adapter and not types):
        return TrainedIn("float32", "no")
    return TrainedIn(held_in(p for p in model.parameters() if p.device.type != "meta") or "float32", "no")


def _moment_types(optimizer: Moments | None) -> set[torch.dtype]:
    """Types that a checkpoint's file holds moments in."""
    stored = optimizer.stored_types().values() if isinstance(optimizer, StoredMoments) else ()
    return {dtype for types in stored for dtype in types}
