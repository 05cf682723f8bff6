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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entropy_core.uncertainty import leave_one_prompt_out
from entropy_experiments.compare.sides import Side, step_of
from entropy_experiments.records.estimate_entries import interval_estimate
from entropy_experiments.records.estimates import NO_ESTIMATE, Estimate, Measurement
from entropy_experiments.records.leave_one_out import LeftOut, read_leave_one_out
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.record import json_of
from entropy_experiments.records.zero_or_one import change_of_zeros_and_ones, of_zeros_and_ones, zeros_and_ones
from entropy_experiments.report.verdict import PARTS
from entropy_experiments.statistics.agreement import unpaired_agreement
from entropy_experiments.statistics.confidence import UNTRUSTED, Known, shown
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom
from entropy_experiments.text.numbers import as_number


@dataclass(frozen=True)
class Quantity:
    """One number of an analysis: its column in leave_one_out.parquet, what to call it, and its unit."""

    key: str
    label: str
    unit: str

    @property
    def is_change(self) -> bool:
        """Whether its sign says which way something moved."""
        return self.key.startswith(("actual.", "predicted."))


@dataclass(frozen=True)
class Difference:
    """This side minus side A.

    number: the difference with its 95% interval: of the differences with each prompt left out where they are paired, else
    Student's. prompts: paired over so many, 0: unpaired; `reason` then says why.
    """

    number: Estimate
    prompts: int
    reason: str = ""

    @property
    def value(self) -> float:
        """The difference itself."""
        return self.number.value or 0.0

    @property
    def is_nothing(self) -> bool:
        """Whether both sides are the same number, without an error."""
        return self.value == 0.0 and not self.number.standard_error

    @property
    def differs_from_zero(self) -> bool | None:
        """Whether 0 lies outside its 95% interval; None without an error."""
        low, high = self.number.low, self.number.high
        return None if low is None or high is None else not low <= 0.0 <= high


@dataclass(frozen=True)
class Compared:
    """One quantity: the number of every side, None where it has none, and the differences from side A (None for A itself, and
    where either number is missing).
    """

    quantity: Quantity
    numbers: tuple[Estimate | None, ...]
    differences: tuple[Difference | None, ...]

    def known(self, place: int) -> Known | None:
        """A side's value with its 95% interval."""
        number = self.numbers[place]
        return None if number is None else number.known()

    def gap(self, place: int) -> Known | None:
        """Its difference from side A with its 95% interval."""
        difference = self.differences[place]
        return None if difference is None else difference.number.known()

    def text(self, place: int, plus: bool = True) -> str:
        """A side's value with its 95% interval in words."""
        return shown(self.known(place), plus)


@dataclass(frozen=True)
class Point:
    """One analysis of each side, at one training step (of sweeps; of single analyses the steps may differ)."""

    step: int
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
    summary = analyses[0].summary
    estimator, measured = summary.estimator or summary.estimand.gradient, f"actual.{summary.estimand.measure}"
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
        numbers = [_number(results, quantity.key) for results in analyses]
        series = [_left_out(results, table, quantity.key) for results, table in zip(analyses, stored, strict=True)]
        gaps = [_difference(numbers[0], n, series[0], s) for n, s in zip(numbers[1:], series[1:], strict=True)]
        if quantity.key == "reward" and all(_rewards_are_zeros_and_ones(results) for results in analyses):
            gaps = [g and replace(g, number=change_of_zeros_and_ones(g.number)) for g in gaps]
        if any(number is not None for number in numbers):
            rows.append(Compared(quantity, tuple(numbers), (None, *gaps)))
    return Point(step_of(analyses[-1]), tuple(analyses), tuple(rows))


def compare_sides(sides: Sequence[Side]) -> list[Point]:
    """One point for analyses; for sweeps one for every training step that all have, in order.

    An empty list where sweeps share no step.
    """
    if sides[0].kind == "analysis":
        return [compare_analyses([side.first for side in sides])]
    by_step = [{step_of(results): results for results in side.points} for side in sides]
    shared = sorted(step for step in by_step[0] if all(step in steps for steps in by_step[1:]))
    return [compare_analyses([steps[step] for steps in by_step]) for step in shared]


def _number(results: ResultsFolder, key: str) -> Estimate | None:
    """From the summary, or from the evaluation sequences where that does not hold it; None where there is no value."""
    summary, (kind, *rest) = results.summary, key.split(".")
    found: Estimate | None = None
    if kind == "entropy":
        found = getattr(summary.entropy, rest[0])
    elif kind == "actual":
        found = getattr(summary.actual, rest[0])
    elif kind == "predicted":
        parts = {str(name): parts for name, parts in summary.predicted.items()}.get(rest[0])
        found = None if parts is None else getattr(parts, rest[1])
    elif (ratio := _ratio_of_rows(results, key)) is not None:
        above, below, index, _ = ratio
        found = interval_estimate(float(above.sum() / below.sum()), leave_one_prompt_out(above, index, below).numpy())
        if key == "reward" and zeros_and_ones(above.tolist()):
            found = of_zeros_and_ones(found, len(above), len(index.unique()))
    return None if found is None or found.value is None else found


def _rewards_are_zeros_and_ones(results: ResultsFolder) -> bool:
    found = _ratio_of_rows(results, "reward")
    return found is not None and zeros_and_ones(found[0].tolist())


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
    left: Estimate | None,
    right: Estimate | None,
    left_out: tuple[tuple[str, ...], Tensor] | None,
    right_out: tuple[tuple[str, ...], Tensor] | None,
) -> Difference | None:
    """right - left, paired where both series are over the same prompts; without an interval where a side has none by itself."""
    if left is None or right is None or left.value is None or right.value is None:
        return None
    change = right.value - left.value
    if any(isinstance(side, Measurement) and not side.trustworthy for side in (left, right)):
        nothing = NO_ESTIMATE.model_copy(update={"value": change})
        return Difference(nothing, 0, UNTRUSTED)
    reason = "not stored prompt by prompt" if left_out is None or right_out is None else ""
    if left_out is not None and right_out is not None:
        (one, a), (other, b) = left_out, right_out
        if sorted(one) == sorted(other):
            if len(one) > 1:  # the prompts of both brought into one order
                first, second = (sorted(range(len(texts)), key=texts.__getitem__) for texts in (one, other))
                return Difference(interval_estimate(change, (b[second] - a[first]).numpy()), len(one))
            reason = "a single prompt"
        else:
            shared = len(set(one) & set(other))
            reason = f"other evaluation prompts ({shared} of {len(one)} shared)"
    if left.standard_error is None or right.standard_error is None:
        return Difference(NO_ESTIMATE.model_copy(update={"value": change}), 0, reason)
    series = [None if side is None or len(side[1]) < 2 else side[1].numpy() for side in (left_out, right_out)]
    counts = [math.inf if known is None else float(effective_degrees_of_freedom(known)) + 1 for known in series]
    sides = (right.value, right.standard_error), (left.value, left.standard_error)
    compared = unpaired_agreement(*sides, (counts[1], counts[0]))
    if compared is None:
        exact = Estimate(value=change, standard_error=0.0, low=change, high=change, degrees_of_freedom=None)
        return Difference(exact, 0, reason)
    freedom = compared.degrees_of_freedom
    number = Estimate(
        value=change,
        standard_error=compared.standard_error,
        low=compared.low,
        high=compared.high,
        degrees_of_freedom=freedom if math.isfinite(freedom) else None,
    )
    return Difference(number, 0, reason)


def settings_that_differ(points: Sequence[ResultsFolder]) -> list[tuple[str, list[Any]]]:
    """Names and values of everything recorded about sampling, task and training that is not the same on all sides."""
    flat = [_flatten({"policy": json_of(p.summary.policy), "attribution": _step_settings(p)}) for p in points]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [values.get(name) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _step_settings(results: ResultsFolder) -> dict[str, str]:
    step = results.summary.attribution
    return {
        "preconditioner of the shares": step.preconditioner,
        "preconditioner of the kernel": step.kernel_preconditioner,
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}".removeprefix("."))
    return flat
