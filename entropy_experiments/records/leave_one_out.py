"""Every number of an analysis with one evaluation prompt left out: what paired comparisons between analyses rest on.

``leave_one_out.parquet`` has a row per evaluation prompt and a column per number: ``entropy.per_token``,
``predicted.ESTIMATOR.PART``, ``actual.snis``, ``actual.fixed_prefix``, ``share.prompt.NUMBER`` (accounting share of the sequences
of a training prompt), nats per token. Two analyses with the same evaluation prompts err together; the difference of their columns
is the leave-one-out series of the difference, so that

    se(b - a)^2 = (B - 1)/B  sum_p (d_{-p} - mean_p d_{-p})^2,     d_{-p} = b_{-p} - a_{-p}

with B prompts (entropy_core.uncertainty). Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from entropy_core.uncertainty import leave_one_prompt_out
from entropy_experiments.statistics.agreement import compare
from entropy_experiments.statistics.estimand import measure_of
from entropy_experiments.statistics.largest_part import largest_part
from entropy_experiments.step.numbers import AnalysisNumbers
from rl_training.errors import UserError, first_line
from rl_training.files import write_whole_by
from rl_training.sampling import Rollouts

FILE_NAME = "leave_one_out.parquet"
SHARE_OF_PROMPT = "share.prompt."


def leave_one_out_columns(evaluation: Rollouts, numbers: AnalysisNumbers) -> dict[str, Tensor]:
    """Name of the number -> (B,) float64 values, prompts in ascending order of index."""
    statistics, index = numbers.eval_statistics, torch.tensor(evaluation.prompt_index)
    lengths = torch.tensor(evaluation.lengths, dtype=torch.float64)
    columns = {"entropy.per_token": leave_one_prompt_out(statistics.entropy_sums().cpu(), index, lengths)}
    step = numbers.step
    for estimator, parts in ({} if step is None else step.predictions.per_token).items():
        for part, estimate in parts.items():
            if estimate.left_out is not None:
                columns[f"predicted.{estimator}.{part}"] = estimate.left_out.cpu()
    full = None if step is None else step.measured_step
    for name in ("snis", "fixed_prefix"):
        measurement = getattr(full, name, None)
        if measurement is not None and measurement.left_out is not None:
            columns[f"actual.{name}"] = measurement.left_out.cpu()
    return columns


def agreements(numbers: AnalysisNumbers) -> dict[str, dict[str, Any]]:
    """Estimator -> its total against the measurement of the same quantity at the whole step
    (entropy_experiments.statistics.agreement); those without one that is to be trusted are left out.
    """
    step = numbers.step
    if step is None or (full := step.measured_step) is None:
        return {}
    found = {
        name: compare(parts["total"], measured)
        for name, parts in step.predictions.per_token.items()
        if (measured := getattr(full, measure_of(name))) is not None and measured.trustworthy
    }
    return {name: compared.as_dict() for name, compared in found.items() if compared is not None}


def largest_parts(numbers: AnalysisNumbers) -> dict[str, dict[str, Any]]:
    """Estimator -> the largest of batch, momentum and weight decay (entropy_experiments.statistics.largest_part)."""
    found = {}
    predictions = {} if numbers.step is None else numbers.step.predictions.per_token
    for name, parts in predictions.items():
        known = {
            part: (e.value, e.left_out.cpu().numpy())
            for part, e in parts.items()
            if part != "total" and e.left_out is not None
        }
        found[name] = largest_part(known)
    return {name: one.as_dict() for name, one in found.items() if one is not None}


def write_leave_one_out(
    path: Path, evaluation: Rollouts, numbers: AnalysisNumbers, shares: Mapping[int, Tensor] | None = None
) -> None:
    """Write the file; with a single prompt nothing is left, and every value is null.

    shares: training prompt -> (B,), where known.
    """
    texts = dict(zip(evaluation.prompt_index, evaluation.prompt, strict=True))
    table: dict[str, pa.Array] = {
        "prompt_index": pa.array(sorted(texts), pa.int64()),
        "prompt": pa.array([texts[index] for index in sorted(texts)], pa.string()),
    }
    of_prompts = {f"{SHARE_OF_PROMPT}{prompt}": values for prompt, values in (shares or {}).items()}
    for name, values in (leave_one_out_columns(evaluation, numbers) | of_prompts).items():
        known = torch.isfinite(values).tolist()
        entries = [value if finite else None for value, finite in zip(values.tolist(), known, strict=True)]
        table[name] = pa.array(entries, pa.float64())
    write_whole_by(path, lambda part: pq.write_table(pa.table(table), part))


@dataclass(frozen=True)
class LeftOut:
    """The file's content: prompts (B,), and name -> (B,) float64 of the numbers that are known for all of them."""

    prompts: tuple[str, ...]
    columns: dict[str, Tensor]


def read_leave_one_out(folder: Path) -> LeftOut | None:
    """Read the file of a results folder; None where the folder has none (results of format 1).

    Raises UserError where it cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path).to_pydict()
        prompts = tuple(str(text) for text in table.pop("prompt"))
        del table["prompt_index"]
        columns = {
            name: torch.tensor(values, dtype=torch.float64) for name, values in table.items() if None not in values
        }
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        what = first_line(error)[:200]
        raise UserError(f"{path} cannot be read ({what}): run `entropy-experiments analyze` again") from error
    return LeftOut(prompts, columns)
