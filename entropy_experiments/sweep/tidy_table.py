"""All results of a sweep as one tidy table: a row is one number of one checkpoint.

    run, step, quantity, part, estimator, value, standard_error, unit

part: "" or which part of the step (total, batch, momentum, weight_decay) or of the batch (above, below: advantage).
estimator: "" or how it was estimated or measured. A number that an analysis does not have has no row.
Numbers between two checkpoints stand at the later one's step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_experiments.records.estimates import entry_of
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.summary import StepParts
from entropy_experiments.text.numbers import value_and_error
from rl_training.files import write_whole_by

_TOKEN, _COMPLETION = "nats per token", "nats per completion"
_KERNEL_UNITS = {
    "kernel_norm": "nats^2 x P",
    "effective_rank": "directions",
    "training_rank": "directions",
    "same_prompt_share": "share",
}
SCHEMA = pa.schema(
    [("run", pa.string()), ("step", pa.int64()), ("quantity", pa.string()), ("part", pa.string())]
    + [("estimator", pa.string()), ("value", pa.float64()), ("standard_error", pa.float64()), ("unit", pa.string())]
)
_Cell = tuple[str, str, str, Any, str]


def checkpoint_cells(results: ResultsFolder, row: Mapping[str, Any]) -> Iterator[_Cell]:
    """(quantity, part, estimator, number, unit) of one checkpoint; row: its `evolution_rows.checkpoint_row`."""
    summary = results.summary
    yield "entropy", "", "", entry_of(summary.entropy.per_token), _TOKEN
    yield "entropy", "", "", entry_of(summary.entropy.per_completion), _COMPLETION
    yield "surprisal", "", "", entry_of(summary.entropy.surprisal_per_completion), _COMPLETION
    yield "reward", "", "evaluation buffer", row["reward"], "reward"
    yield "reward", "", "training buffer", summary.sampling.training.mean_reward, "reward"
    for predicted, unit in ((summary.predicted, _TOKEN), (summary.predicted_per_completion, _COMPLETION)):
        for estimator, parts in predicted.items():
            for part in StepParts.model_fields:
                yield "predicted", part, estimator, entry_of(getattr(parts, part)), unit
    for measure, found in (("snis", summary.actual.snis), ("fixed_prefix", summary.actual.fixed_prefix)):
        if found is not None:
            yield "actual", "total", measure, entry_of(found), _TOKEN
            yield "effective_sample_size", "", measure, found.effective_sample_size, "sequences"
    for scaled in summary.scaling:
        name = f"actual at {scaled.scale:g} x the step"
        snis = {"value": scaled.actual_snis, "standard_error": scaled.actual_snis_standard_error}
        yield name, "total", "snis", snis, _TOKEN
        yield name, "total", "fixed_prefix", scaled.actual_fixed_prefix, _TOKEN
    for name, unit in _KERNEL_UNITS.items():
        yield name, "", "", row[name], unit
    yield "same_prompt_pairs", "", "", row["same_prompt_pairs"], "share"
    for part, number in (row["by_advantage"] or {}).items():
        yield "delta_h_of_sequences", part, "", number, _TOKEN
    yield "failed_self_checks", "", "", float(len(row["failed_checks"])), "checks"


def change_cells(change: Mapping[str, Any]) -> Iterator[_Cell]:
    """The same of one of `evolution["changes"]`."""
    for name in ("observed", "expected", "difference"):
        yield "change_since_previous", "total", name, change[name], _TOKEN
    yield "alignment", "", "debiased CKA", change["alignment"], ""
    yield "alignment", "", "cosine", change["cosine"], ""
    yield "losing_prompts", "", "spearman", change["losers"]["spearman"], ""
    yield "price_of_reward", "", "", change["price"]["price"], "nats per token for a reward of 1"


def write_table(path: Path, evolutions: Mapping[str, tuple[Mapping[str, Any], list[ResultsFolder]]]) -> None:
    """The table of all runs, name -> (`describe_evolution`, its checkpoints by step); appears whole or not at all."""
    table = []
    for run, (evolution, folders) in evolutions.items():
        cells = [
            (row["step"], cell)
            for row, results in zip(evolution["checkpoints"], folders, strict=True)
            for cell in checkpoint_cells(results, row)
        ]
        cells += [(change["to"], cell) for change in evolution["changes"] for cell in change_cells(change)]
        for step, (quantity, part, estimator, number, unit) in cells:
            value, error = value_and_error(number)
            if value is not None:
                content = (run, step, quantity, part, estimator, value, error, unit)
                table.append(dict(zip(SCHEMA.names, content, strict=True)))
    write_whole_by(path, lambda part: pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), part))
