"""All results of a sweep as one tidy table: a row is one number of one checkpoint.

Its columns are in records.columns. A number that an analysis does not have has no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_experiments.records.columns import SWEEP_NUMBERS, schema_of
from entropy_experiments.records.estimates import Estimate, Mean
from entropy_experiments.records.evolution import CheckpointChange, CheckpointRow
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.record import Record
from entropy_experiments.records.summary import StepParts
from entropy_experiments.sweep.figures import Runs
from rl_training.files import write_whole_by

_TOKEN, _COMPLETION = "nats per token", "nats per completion"
_KERNEL_UNITS = {
    "kernel_norm": "nats^2 x P",
    "effective_rank": "directions",
    "training_rank": "directions",
    "same_prompt_share": "share",
}
_Number = Estimate | Mean | float | None
_Cell = tuple[str, str, str, _Number, str]


def checkpoint_cells(results: ResultsFolder, row: CheckpointRow) -> Iterator[_Cell]:
    """(quantity, part, estimator, number, unit) of one checkpoint."""
    summary = results.summary
    yield "entropy", "", "", summary.entropy.per_token, _TOKEN
    yield "entropy", "", "", summary.entropy.per_completion, _COMPLETION
    yield "surprisal", "", "", summary.entropy.surprisal_per_completion, _COMPLETION
    yield "reward", "", "evaluation buffer", row.reward, "reward"
    yield "reward", "", "training buffer", summary.sampling.training.mean_reward, "reward"
    for predicted, unit in ((summary.predicted, _TOKEN), (summary.predicted_per_completion, _COMPLETION)):
        for estimator, parts in predicted.items():
            for part in StepParts.model_fields:
                yield "predicted", part, estimator, getattr(parts, part), unit
    for measure, found in (("snis", summary.actual.snis), ("fixed_prefix", summary.actual.fixed_prefix)):
        if found is not None:
            yield "actual", "total", measure, found, _TOKEN
            yield "effective_sample_size", "", measure, found.effective_sample_size, "sequences"
    for scaled in summary.scaling:
        name = f"actual at {scaled.scale:g} x the step"
        snis = Mean(value=scaled.actual_snis, standard_error=scaled.actual_snis_standard_error)
        yield name, "total", "snis", snis, _TOKEN
        yield name, "total", "fixed_prefix", scaled.actual_fixed_prefix, _TOKEN
    for name, unit in _KERNEL_UNITS.items():
        yield name, "", "", getattr(row, name), unit
    yield "same_prompt_pairs", "", "", row.same_prompt_pairs, "share"
    if row.by_advantage is not None:
        yield "delta_h_of_sequences", "above", "", row.by_advantage.above, _TOKEN
        yield "delta_h_of_sequences", "below", "", row.by_advantage.below, _TOKEN
    yield "failed_self_checks", "", "", float(len(row.failed_checks)), "checks"


def change_cells(change: CheckpointChange) -> Iterator[_Cell]:
    """The same of two successive checkpoints."""
    for name in ("observed", "expected", "difference"):
        yield "change_since_previous", "total", name, getattr(change, name), _TOKEN
    yield "alignment", "", "debiased CKA", change.alignment, ""
    yield "alignment", "", "cosine", change.cosine.value, ""
    yield "losing_prompts", "", "spearman", change.losers.spearman, ""
    yield "price_of_reward", "", "", change.price.price, "nats per token for a reward of 1"


def write_table(path: Path, evolutions: Runs) -> None:
    """The table of all runs; appears whole or not at all."""
    table, schema = [], schema_of(SWEEP_NUMBERS)
    for run, (evolution, folders) in evolutions.items():
        cells = [
            (row.step, cell)
            for row, results in zip(evolution.checkpoints, folders, strict=True)
            for cell in checkpoint_cells(results, row)
        ]
        cells += [(change.to_step, cell) for change in evolution.changes for cell in change_cells(change)]
        for step, (quantity, part, estimator, number, unit) in cells:
            value, error = (number.value, number.standard_error) if isinstance(number, Record) else (number, None)
            if value is not None:
                content = (run, step, quantity, part, estimator, value, error, unit)
                table.append(dict(zip(schema.names, content, strict=True)))
    write_whole_by(path, lambda part: pq.write_table(pa.Table.from_pylist(table, schema=schema), part))
