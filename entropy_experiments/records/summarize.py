"""summary.json of one analysis, from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.double_sampling import Buffers, TrainingBuffer
from entropy_experiments.records.estimate_entries import (
    finite_number,
    ratio_estimate,
    stored_estimate,
    stored_measurement,
)
from entropy_experiments.records.leave_one_out import agreements, largest_parts
from entropy_experiments.records.preconditioner_labels import of_shares
from entropy_experiments.records.run_record import CheckpointRecord
from entropy_experiments.records.summary import (
    RESULTS_FORMAT,
    ActualRecord,
    BufferRecord,
    EntropyRecord,
    SamplingRecord,
    ScaleRow,
    StepParts,
    StepRecord,
    Summary,
    TrainingBufferRecord,
)
from entropy_experiments.records.writer import finite
from entropy_experiments.step.numbers import AnalysisNumbers, Estimate, MeasuredScale, PartsByEstimator, StepNumbers
from entropy_experiments.step.training_noise import TrainingNoise
from rl_training.sampling import Rollouts


def summarize(
    checkpoint: Checkpoint,
    buffers: Buffers,
    numbers: AnalysisNumbers,
    preconditioning: str,
    training_noise: TrainingNoise | None,
    sections: Mapping[str, Any],
) -> Summary:
    """The whole summary.

    Args:
        checkpoint: The analysed checkpoint.
        buffers: What was drawn.
        numbers: What was computed.
        preconditioning: The kernel's P, "checkpoint", "step" or "none".
        training_noise: What another draw of the training buffer would change; None where it is not known.
        sections: The others by name, as records or as plain data: kernel, leaving_out, policy, kernel_modules, gradient_rows,
            training_precision, analyses.

    Raises:
        pydantic.ValidationError: A section is not of the format: a mistake of this program.
    """
    record, (evaluation, training) = checkpoint.record, buffers
    content = {
        "format_version": RESULTS_FORMAT,
        "checkpoint": CheckpointRecord(path=str(record.path), step=record.step, model=record.model_name),
        "entropy": _entropy(evaluation, numbers),
        "agreement": agreements(numbers),
        "largest_part": largest_parts(numbers),
        "attribution": _step(numbers, preconditioning),
        "training_noise": None if training_noise is None else finite(training_noise.to_json()),
        "rows_drawn": numbers.estimand.rows_drawn,
        "step_analysed": numbers.step is not None,
        "sampling": SamplingRecord(
            evaluation=BufferRecord(**_buffer(evaluation)), training=_training(training), notes=training.notes
        ),
    }
    return Summary.model_validate(content | _changes(numbers.step) | {name: finite(s) for name, s in sections.items()})


def _entropy(evaluation: Rollouts, numbers: AnalysisNumbers) -> EntropyRecord:
    index, lengths = torch.tensor(evaluation.prompt_index), torch.tensor(evaluation.lengths, dtype=torch.float64)
    sums, surprisal = numbers.eval_statistics.entropy_sums().cpu(), -numbers.eval_statistics.scores().cpu()
    return EntropyRecord(
        per_token=ratio_estimate(sums, index, lengths),
        per_completion=ratio_estimate(sums, index),
        surprisal_per_completion=ratio_estimate(surprisal, index),
    )


def _changes(step: StepNumbers | None) -> dict[str, Any]:
    """What the step was predicted and measured to do."""
    if step is None:
        return {"predicted": {}, "predicted_per_completion": {}, "actual": _actual(None), "scaling": []}
    return {
        "predicted": _parts(step.predictions.per_token),
        "predicted_per_completion": _parts(step.predictions.per_completion),
        "actual": _actual(step.measured_step),
        "scaling": [_scaled(m, step.predictions.per_token) for m in step.measured],
    }


def _parts(predicted: PartsByEstimator) -> dict[str, StepParts]:
    return {
        name: StepParts(**{part: stored_estimate(estimate) for part, estimate in parts.items()})
        for name, parts in predicted.items()
    }


def _actual(full_step: MeasuredScale | None) -> ActualRecord:
    if full_step is None:
        return ActualRecord()
    snis = None if full_step.snis is None else stored_measurement(full_step.snis)
    return ActualRecord(snis=snis, fixed_prefix=stored_measurement(full_step.fixed_prefix))


def _step(numbers: AnalysisNumbers, preconditioning: str) -> StepRecord:
    step = numbers.step
    return StepRecord.model_validate(
        {
            "delta_h_batch": None if step is None else finite_number(step.attribution.batch_change),
            "sum_of_shares": None if step is None else finite_number(float(step.attribution.shares.sum())),
            "horizon_factor": None if step is None else finite_number(step.attribution.horizon_factor),
            "preconditioner": of_shares(preconditioning),
            "kernel_preconditioner": preconditioning,
            "gradient_norm": None if step is None else finite_number(step.gradient_norm),
            "clip_coefficient": None if step is None else finite_number(step.clip),
            "step_factor": None if step is None else finite_number(step.attribution.step_factor),
        }
    )


def _scaled(m: MeasuredScale, predicted: PartsByEstimator) -> ScaleRow:
    totals: dict[str, Estimate] = {name: parts["total"] for name, parts in predicted.items()}
    row: dict[str, float | None] = {
        "scale": m.scale,
        "actual_fixed_prefix": m.fixed_prefix.change,
        "predicted_fixed_prefix": m.scale * totals["fixed_prefix"].value,
    }
    if m.snis is not None:
        own, measured = stored_estimate(totals["rao_blackwell"]), stored_measurement(m.snis)
        row |= {
            "predicted": _times(m.scale, own.value),
            "predicted_standard_error": _times(m.scale, own.standard_error),
            "predicted_low": _times(m.scale, own.low),
            "predicted_high": _times(m.scale, own.high),
            "predicted_split": m.scale * totals["split"].value,
            "actual_snis": measured.value,
            "actual_snis_standard_error": measured.standard_error,
            "actual_snis_low": measured.low,
            "actual_snis_high": measured.high,
            "ess": measured.effective_sample_size,
        }
    return ScaleRow.model_validate(finite(row))


def _times(scale: float, number: float | None) -> float | None:
    return None if number is None else scale * number


def _buffer(rollouts: Rollouts) -> dict[str, Any]:
    rewards = [float(r) for r in rollouts.reward if r is not None]
    return {
        "prompts": len(set(rollouts.prompt_index)),
        "sequences": len(rollouts),
        "mean_reward": finite_number(sum(rewards) / len(rewards)) if rewards else None,
        "mean_length": sum(rollouts.lengths) / len(rollouts),
    }


def _training(training: TrainingBuffer) -> TrainingBufferRecord:
    counts = training.counts
    return TrainingBufferRecord(
        **_buffer(training.rollouts),
        rounds=counts.rounds,
        generated=counts.generated,
        rejected=counts.rejected,
        kept=counts.kept,
        filler=counts.filler,
    )
