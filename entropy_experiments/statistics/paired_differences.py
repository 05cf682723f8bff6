"""Agreement of predictions and measurements, from the numbers of a results folder with each evaluation prompt left out.

``summary.json`` holds it since it is decided by the error of the difference; for folders written before, it is made from
``leave_one_out.parquet``, which holds all that is needed. No torch: a report can be written on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entropy_experiments.statistics.agreement import compare
from entropy_experiments.statistics.estimand import measure_of
from entropy_experiments.text.numbers import as_number, lookup


def agreements_of_folder(path: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Estimator -> its agreement, for a folder whose summary has none; empty where the table is missing or cannot be read."""
    try:
        columns = pq.read_table(path / "leave_one_out.parquet").to_pydict()
    except (pa.ArrowException, OSError):
        return {}
    found = {}
    for estimator in lookup(summary, "predicted") or {}:
        kind = measure_of(estimator)
        predicted = _side(columns, f"predicted.{estimator}.total", lookup(summary, "predicted", estimator, "total"))
        compared = compare(predicted, _side(columns, f"actual.{kind}", lookup(summary, "actual", kind)))
        if compared is not None:
            found[estimator] = compared.as_dict()
    return found


def _side(columns: Mapping[str, list[Any]], name: str, entry: Any) -> dict[str, Any]:
    numbers = [as_number(value) for value in columns.get(name, ())]
    known = len(numbers) > 0 and None not in numbers
    value = as_number(lookup(entry, "value"))
    return {"value": value, "left_out": np.array(numbers, dtype=np.float64) if known else None}
