"""Differences between analyses, with standard errors that know which evaluation prompts they share.

    paired (same evaluation prompts)    se(b - a) = jackknife over prompts of b_{-p} - a_{-p}
    unpaired (anything else)            se(b - a) = sqrt(se_a^2 + se_b^2)                  Welch's degrees of freedom

Paired, what a prompt does to both sides cancels; taken as unpaired, the same numbers would look less certain than they are.
Both describe the choice of evaluation prompts and completions alone, not another training buffer or another seed of training.
Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_core.uncertainty import jackknife_standard_error, leave_one_prompt_out
from entropy_experiments.compare.sides import Side, step_of
from entropy_experiments.records.leave_one_out import LeftOut, read_leave_one_out
from entropy_experiments.records.preconditioner_labels import preconditioner_labels
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.verdict import PARTS, primary_estimator
from entropy_experiments.statistics.agreement import told_from_zero, unpaired_agreement
from entropy_experiments.statistics.confidence import freedom_of_analysis, number_entry, shown
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom, jackknife_interval
from entropy_experiments.text.numbers import as_number, lookup, value_and_error


@dataclass(frozen=True)
class Quantity:
    """One number of an analysis: its column in leave_one_out.parquet, what to call it, and its unit."""

    key: str
    label: str
    unit: str


@dataclass(frozen=True)
class Difference:
    """value: this side minus side A. standard_error: None where it is not known. prompts: paired over so many, 0: unpaired;
    `reason` then says why. low, high: its 95% interval, of the differences with each prompt left out where they are paired, else
    Student's on `degrees_of_freedom`; None without an error.
    """

    value: float
    standard_error: float | None
    prompts: int
    reason: str = ""
    low: float | None = None
    high: float | None = None
    degrees_of_freedom: float = math.inf

    @property
    def told_from_zero(self) -> bool | None:
        """Whether 0 lies outside its 95% interval; None without an error."""
        if self.low is None or self.high is None:
            return told_from_zero(self.value, self.standard_error, self.degrees_of_freedom)
        return not self.low <= 0.0 <= self.high

    def as_number(self) -> dict[str, float | None]:
        """{"value", "standard_error", "low", "high", "degrees_of_freedom"}."""
        freedom = self.degrees_of_freedom if math.isfinite(self.degrees_of_freedom) else None
        ends = {"low": self.low, "high": self.high}
        return {"value": self.value, "standard_error": self.standard_error, **ends, "degrees_of_freedom": freedom}


@dataclass(frozen=True)
class Compared:
    """One quantity: (value, standard error) of every side, the differences from side A (None for A itself, and where either value
    is missing), and the values with their intervals (entropy_experiments.statistics.confidence.number_entry).
    """

    quantity: Quantity
    values: tuple[tuple[float | None, float | None], ...]
    differences: tuple[Difference | None, ...]
    numbers: tuple[dict[str, float | None], ...] = ()

    def text(self, place: int, plus: bool = True) -> str:
        """A side's value with its 95% interval."""
        return shown(self.numbers[place], plus)


@dataclass(frozen=True)
class Point:
    """One analysis of each side, at one training step (of sweeps; of single analyses the steps may differ)."""

    step: float | None
    analyses: tuple[ResultsFolder, ...]
    rows: tuple[Compared, ...]

    def row(self, name: str) -> Compared | None:
        """The quantity of this name: "entropy", "predicted", "measured", …"""
        return next((row for row in self.rows if _name(row.quantity.key) == name), None)


def _name(key: str) -> str:
    """The kind of quantity that a key stands for."""
    if key.startswith("predicted."):
        part = key.rsplit(".", 1)[1]
        return "predicted" if part == "total" else part
    return {"entropy.per_token": "entropy"}.get(key, "measured" if key.startswith("actual.") else key)


_PART_LABELS = {"total": "Predicted change", **{part: f"Predicted, from {name}" for part, name in PARTS.items()}}


def quantities(analyses: Sequence[ResultsFolder]) -> list[Quantity]:
    """What can be compared, in the report's order; the estimator is side A's default one."""
    per_token = "nats per token"
    given = lookup(analyses[0].raw, "rows_drawn") is False
    estimator = "fixed_prefix" if given else primary_estimator(analyses[0].raw) or "rao_blackwell"
    measured = "actual.fixed_prefix" if given else "actual.snis"
    return [
        Quantity("entropy.per_token", "Entropy before the step", per_token),
        Quantity(measured, "Measured change", per_token),
        *(Quantity(f"predicted.{estimator}.{part}", label, per_token) for part, label in _PART_LABELS.items()),
        Quantity("entropy.per_completion", "Entropy of a completion", "nats per completion"),
        Quantity("reward", "Mean reward, evaluation prompts", "reward"),
        Quantity("length", "Mean length, evaluation completions", "tokens"),
    ]


def compare_analyses(analyses: Sequence[ResultsFolder]) -> Point:
    """Every quantity of the analyses side by side, and each one's difference from the first."""
    stored = [read_leave_one_out(results.path) for results in analyses]
    rows = []
    for quantity in quantities(analyses):
        values = tuple(_value(results, quantity.key) for results in analyses)
        series = [_left_out(results, table, quantity.key) for results, table in zip(analyses, stored, strict=True)]
        rows.append(
            Compared(
                quantity,
                values,
                (
                    None,
                    *(
                        _difference(values[0], value, series[0], s)
                        for value, s in zip(values[1:], series[1:], strict=True)
                    ),
                ),
                tuple(_number(results, quantity.key) for results in analyses),
            )
        )
    return Point(step_of(analyses[-1]), tuple(analyses), tuple(row for row in rows if _known(row)))


def compare_sides(sides: Sequence[Side]) -> list[Point]:
    """One point for analyses; for sweeps one for every training step that all have, in order.

    An empty list where sweeps share no step.
    """
    if sides[0].kind == "analysis":
        return [compare_analyses([side.first for side in sides])]
    by_step = [{step_of(results): results for results in side.points} for side in sides]
    shared = sorted(step for step in by_step[0] if step is not None and all(step in steps for steps in by_step[1:]))
    return [compare_analyses([steps[step] for steps in by_step]) for step in shared]


def _known(row: Compared) -> bool:
    return any(value is not None for value, _ in row.values)


def _value(results: ResultsFolder, key: str) -> tuple[float | None, float | None]:
    """(value, standard error) from the summary, or from the evaluation sequences where it does not say."""
    entry = lookup(results.raw, *key.split("."))
    if entry is not None:
        return value_and_error(entry)
    found = _ratio_of_rows(results, key)
    if found is None:
        return None, None
    above, below, index, _ = found
    error = jackknife_standard_error(leave_one_prompt_out(above, index, below))
    return float(above.sum() / below.sum()), error if math.isfinite(error) else None


def _number(results: ResultsFolder, key: str) -> dict[str, float | None]:
    """The same with its 95% interval."""
    freedom, entry = freedom_of_analysis(results.raw), lookup(results.raw, *key.split("."))
    found = None if entry is not None else _ratio_of_rows(results, key)
    if found is None:
        return number_entry(entry, freedom)
    above, below, index, _ = found
    value = float(above.sum() / below.sum())
    ends = jackknife_interval(value, leave_one_prompt_out(above, index, below).numpy())
    error = float(ends.standard_error)
    return {"value": value, "standard_error": error if math.isfinite(error) else None, **ends.as_dict()}


# Numbers that are a ratio of sums over the evaluation sequences: key -> (numerator, denominator; None: their number).
_RATIOS: dict[str, tuple[str, str | None]] = {
    "entropy.per_token": ("entropy_sum", "length"),
    "entropy.per_completion": ("entropy_sum", None),
    "reward": ("reward", None),
    "length": ("length", None),
}


def _ratio_of_rows(results: ResultsFolder, key: str) -> tuple[Tensor, Tensor, Tensor, list[str]] | None:
    """(numerators, denominators, prompt index, texts), (N,) each; None where a sequence lacks its number."""
    if key not in _RATIOS:
        return None
    above, below = _RATIOS[key]
    columns = [[as_number(row.get(name)) if name else 1.0 for row in results.evaluation] for name in (above, below)]
    if not results.evaluation or any(value is None for column in columns for value in column):
        return None
    numerators, denominators = (torch.tensor(column, dtype=torch.float64) for column in columns)
    index = torch.tensor([row["prompt_index"] for row in results.evaluation])
    return numerators, denominators, index, [row["prompt"] for row in results.evaluation]


def _left_out(results: ResultsFolder, stored: LeftOut | None, key: str) -> tuple[tuple[str, ...], Tensor] | None:
    """(prompts, values with each left out), from the stored table or the sequences; None where neither has them."""
    if stored is not None and key in stored.columns:
        return stored.prompts, stored.columns[key]
    found = _ratio_of_rows(results, key)
    if found is None:
        return None
    above, below, index, texts = found
    prompts = dict(zip(index.tolist(), texts, strict=True))
    return tuple(prompts[i] for i in sorted(prompts)), leave_one_prompt_out(above, index, below)


def _difference(
    left: tuple[float | None, float | None],
    right: tuple[float | None, float | None],
    left_out: tuple[tuple[str, ...], Tensor] | None,
    right_out: tuple[tuple[str, ...], Tensor] | None,
) -> Difference | None:
    """right - left, paired where both series are over the same prompts."""
    if left[0] is None or right[0] is None:
        return None
    change = right[0] - left[0]
    reason = "not stored prompt by prompt" if left_out is None or right_out is None else ""
    if left_out is not None and right_out is not None:
        (one, a), (other, b) = left_out, right_out
        if sorted(one) == sorted(other):
            if len(one) > 1:
                return _paired_difference(change, one, a, other, b)
            reason = "a single prompt"
        else:
            shared = len(set(one) & set(other))
            reason = f"other evaluation prompts ({shared} of {len(one)} shared)"
    if left[1] is None or right[1] is None:
        return Difference(change, None, 0, reason)
    series = [None if side is None or len(side[1]) < 2 else side[1].numpy() for side in (left_out, right_out)]
    counts = [math.inf if known is None else float(effective_degrees_of_freedom(known)) + 1 for known in series]
    compared = unpaired_agreement((right[0], right[1]), (left[0], left[1]), (counts[1], counts[0]))
    if compared is None:
        return Difference(change, 0.0, 0, reason)
    return Difference(
        change, compared.standard_error, 0, reason, compared.low, compared.high, compared.degrees_of_freedom
    )


def _paired_difference(change: float, one: tuple[str, ...], a: Tensor, other: tuple[str, ...], b: Tensor) -> Difference:
    """Of b - a with the prompts of both brought into one order."""
    first, second = (sorted(range(len(texts)), key=texts.__getitem__) for texts in (one, other))
    found = jackknife_interval(change, (b[second] - a[first]).numpy())
    ends = found.as_dict()
    error, freedom = float(found.standard_error), ends["degrees_of_freedom"]
    return Difference(
        change,
        error if math.isfinite(error) else None,
        len(one),
        low=ends["low"],
        high=ends["high"],
        degrees_of_freedom=math.inf if freedom is None else freedom,
    )


def settings_that_differ(points: Sequence[ResultsFolder]) -> list[tuple[str, list[Any]]]:
    """Names and values of everything recorded about law, training and sampling that is not the same on all sides."""
    flat = [_flatten({"policy": lookup(p.raw, "policy") or {}, "attribution": _step_settings(p)}) for p in points]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [values.get(name) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _step_settings(results: ResultsFolder) -> dict[str, Any]:
    shares, kernel = preconditioner_labels(results.raw)
    return {"preconditioner of the shares": shares, "preconditioner of the kernel": kernel}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}".removeprefix("."))
    return flat
