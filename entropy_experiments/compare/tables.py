"""The tables of a comparison, as rows of finished text, and its numbers as records for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from entropy_experiments.compare.differences import Compared, Difference, Point, compare_analyses, settings_that_differ
from entropy_experiments.compare.sides import Side, step_of
from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.estimates import Estimate, StudentEstimate, entry_of
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.analysis_tables import Table
from entropy_experiments.report.outcome import same_prompt_effect
from entropy_experiments.text.display import clip, one_line
from entropy_experiments.text.numbers import NOT_KNOWN, as_number, plain, plus_minus, signed

_UNIT = "nats per token"
_PANELS = {"entropy": "entropy h", "measured": "measured Δh", "predicted": "predicted Δh"}
Entry = dict[str, float | None] | None


def headline(sides: Sequence[Side], point: Point | None) -> list[dict[str, str]]:
    """The tiles at the head of the page: the measured (or predicted) change of each side minus A's."""
    row = None if point is None else point.row("measured") or point.row("predicted")
    if row is None:
        return []
    tiles = []
    for side, gap in zip(sides, row.differences, strict=True):
        if gap is not None:
            label = f"{row.quantity.label}, {side.letter} minus A"
            tiles.append({"label": label, "value": _gap(gap), "unit": row.quantity.unit})
    return tiles


def side_table(sides: Sequence[Side], point: Point | None) -> Table:
    """Who is who."""
    columns = (
        ("", False),
        ("Folder", False),
        ("Model", False),
        ("Step", True),
        ("Evaluation", True),
        ("Training", True),
    )
    rows = []
    for place, side in enumerate(sides):
        results = side.points[-1] if point is None else point.analyses[place]
        if side.kind == "analysis":
            step = plain(step_of(results))
        else:
            step = ", ".join(plain(step_of(results)) for results in side.points)
        model = one_line(results.summary.checkpoint.model, 60)
        counts = [f"{len(rows_)} sequences" for rows_ in (results.evaluation, results.training)]
        rows.append([side.letter, clip(str(side.path), 200, "end"), model, step, *counts])
    return Table("What is compared", columns, rows)


def comparison_tables(sides: Sequence[Side], points: Sequence[Point]) -> list[Table]:
    """Differences at every shared step, the last first; then what has no standard error, weightings, and settings."""
    found = [_differences(sides, point) for point in reversed(points)]
    if points:
        found += [_plain_numbers(sides, points[-1]), _weightings(sides, points[-1]), _settings(sides, points[-1])]
    return [table for table in found if table.rows]


def _differences(sides: Sequence[Side], point: Point) -> Table:
    step = "" if sides[0].kind == "analysis" else f" at step {plain(point.step)}"
    columns = [("Quantity", False), ("Unit", False)]
    columns += [(side.letter, True) for side in sides]
    for side in sides[1:]:
        columns += [(f"{side.letter} minus A", True), (f"Standard errors from 0, {side.letter}", True), ("How", False)]
    rows = []
    for row in point.rows:
        cells = [row.quantity.label, row.quantity.unit, *(_cell(number, plus=False) for number in row.numbers)]
        for gap in row.differences[1:]:
            cells += ["not known", "–", "–"] if gap is None else [_gap(gap), _distance(gap), _how(gap)]
        rows.append(cells)
    return Table(f"Values ± standard errors and differences{step}", tuple(columns), rows)


def _cell(number: Estimate | StudentEstimate | None, plus: bool = True) -> str:
    return NOT_KNOWN if number is None else plus_minus(number.value, number.standard_error, plus)


def _gap(gap: Difference) -> str:
    return _cell(gap.number)


def _distance(gap: Difference) -> str:
    error = gap.number.standard_error
    return f"{abs(gap.value) / error:.1f}" if error else "–"


def _how(gap: Difference) -> str:
    if gap.prompts:
        return f"paired over {gap.prompts} prompts"
    return f"unpaired: {gap.reason}" if gap.reason else "unpaired"


def _effective_sample(summary: Summary) -> float | None:
    return None if summary.actual.snis is None else summary.actual.snis.effective_sample_size


_PLAIN_NUMBERS: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
    ("Effective sample of the measurement, sequences", _effective_sample),
    ("Gradient norm of the training buffer", lambda s: s.attribution.gradient_norm),
    ("Clip coefficient", lambda s: s.attribution.clip_coefficient),
    ("Change over the life of the momentum buffer, multiple of the step's", lambda s: s.attribution.horizon_factor),
    ("Mean reward of the training buffer", lambda s: s.sampling.training.mean_reward),
    ("Mean length in the training buffer, tokens", lambda s: s.sampling.training.mean_length),
    ("Mean of |K₁|", lambda s: None if s.kernel is None else s.kernel.mean_abs),
)


def _plain_numbers(sides: Sequence[Side], point: Point) -> Table:
    rows: list[list[str]] = []
    for label, number in _PLAIN_NUMBERS:
        values = [number(results.summary) for results in point.analyses]
        if any(value is not None for value in values):
            rows.append([label, *(plain(value) for value in values)])
    same = [same_prompt_effect(results.summary) for results in point.analyses]
    for label, key in (("one prompt", "cosine"), ("two prompts", "cosine_other_prompts")):
        if any(effect[key] is not None for effect in same):
            rows.append([f"Mean cosine of gradients, {label}", *(signed(effect[key]) for effect in same)])
    columns = (("Quantity", False), *((side.letter, True) for side in sides))
    return Table("Numbers without a standard error, side by side", columns, rows)


def _weightings(sides: Sequence[Side], point: Point) -> Table:
    """Predicted changes of the weightings that every analysis tries on its own buffer."""
    by_side: list[dict[str, StudentEstimate]] = []
    for results in point.analyses:
        found = finished(results.summary.analyses.weighting_schemes)
        rows = () if found is None else found.rows
        numbers = {row.label: row.delta_h.equal_length for row in rows if row.delta_h is not None}
        by_side.append({label: number for label, number in numbers.items() if number.value is not None})
    labels = list(dict.fromkeys(label for rows in by_side for label in rows))
    table = [
        [one_line(label, 80), *(_cell(rows.get(label)) for rows in by_side)]
        for label in labels
        if sum(label in rows for rows in by_side) > 1
    ]
    columns = (("Weighting", False), *((side.letter, True) for side in sides))
    return Table(f"Predicted change by weighting, each in a step as long as the run's, {_UNIT}", columns, table)


_NAMES = {
    "policy.tokenizer": "Tokenizer (fingerprint)",
    "policy.sampling_config.temperature": "Sampling temperature",
    "policy.sampling_config.max_completion_length": "Longest completion, tokens",
    "policy.task": "Task",
}


def _settings(sides: Sequence[Side], point: Point) -> Table:
    rows = []
    for name, values in settings_that_differ(point.analyses):
        label = _NAMES.get(
            name, name.removeprefix("policy.").removeprefix("attribution.").replace("_", " ").replace(".", ": ")
        )
        rows.append([one_line(label, 80), *(_setting(value) for value in values)])
    columns = (("Setting", False), *((side.letter, False) for side in sides))
    return Table("Recorded settings that differ", columns, rows)


def _setting(value: object) -> str:
    if value is None:
        return "not recorded"
    return plain(value) if as_number(value) is not None else one_line(str(value), 120)


def quantity_records(sides: Sequence[Side], point: Point) -> list[dict[str, Any]]:
    """Every quantity as JSON: its values by letter, and each difference from A."""
    return [_quantity_record(sides, row) for row in point.rows]


def _quantity_record(sides: Sequence[Side], row: Compared) -> dict[str, Any]:
    name, part, estimator = tidy_names(row.quantity.key)
    return {
        "quantity": name,
        "part": part,
        "estimator": estimator,
        "label": row.quantity.label,
        "unit": row.quantity.unit,
        "values": {
            side.letter: {
                "value": None if number is None else number.value,
                "standard_error": None if number is None else number.standard_error,
            }
            for side, number in zip(sides, row.numbers, strict=True)
        },
        "minus_a": {
            side.letter: {
                "value": gap.value,
                "standard_error": gap.number.standard_error,
                "low": gap.number.low,
                "high": gap.number.high,
                "paired_prompts": gap.prompts,
                "why_unpaired": gap.reason or None,
                "degrees_of_freedom": gap.number.degrees_of_freedom,
                "told_from_zero": gap.told_from_zero,
            }
            for side, gap in zip(sides, row.differences, strict=True)
            if gap is not None
        },
    }


def tidy_names(key: str) -> tuple[str, str | None, str | None]:
    """(quantity, part, estimator) of a column of leave_one_out.parquet."""
    kind, *rest = key.split(".")
    if kind == "predicted":
        return "predicted_change", rest[1], rest[0]
    if kind == "actual":
        return "measured_change", "total", rest[0]
    return (
        {"entropy.per_token": "entropy", "entropy.per_completion": "entropy_per_completion"}.get(key, key),
        None,
        None,
    )


def checkpoint_panels(
    sides: Sequence[Side], points: Sequence[Point]
) -> tuple[list[list[float]], dict[str, list[list[Entry]]], dict[str, tuple[list[float], list[list[Entry]]]]]:
    """The arguments of plot_compared_checkpoints: steps, values of every side, differences at the shared steps."""
    alone = [[compare_analyses([results]) for results in side.points] for side in sides]
    steps = [[float(point.step) for point in own] for own in alone]
    panels: dict[str, list[list[Entry]]] = {}
    differences: dict[str, tuple[list[float], list[list[Entry]]]] = {}
    for name, title in _PANELS.items():
        panels[title] = [[_value(point, name) for point in own] for own in alone]
        gaps = [[_difference(point, name, k) for point in points] for k in range(1, len(sides))]
        differences[title] = ([float(point.step) for point in points], gaps)
    return steps, panels, differences


def _value(point: Point, name: str) -> Entry:
    row = point.row(name)
    return None if row is None else entry_of(row.numbers[0])


def _difference(point: Point, name: str, place: int) -> Entry:
    row = point.row(name)
    gap = None if row is None else row.differences[place]
    return None if gap is None else entry_of(gap.number)
