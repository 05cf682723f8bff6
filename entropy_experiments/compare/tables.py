"""The tables of a comparison, as rows of finished text, and its numbers as records for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from entropy_experiments.compare.differences import Compared, Difference, Point, compare_analyses, settings_that_differ
from entropy_experiments.compare.sides import Side, step_of
from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.comparison_record import DifferenceRecord, QuantityRecord
from entropy_experiments.records.estimates import Estimate, Mean, StudentEstimate
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.content import Table, Tile
from entropy_experiments.report.figures.comparison import ComparedChanges, ComparedCheckpoints
from entropy_experiments.report.outcome import same_prompt_effect
from entropy_experiments.statistics.confidence import Known
from entropy_experiments.text.display import clip, one_line
from entropy_experiments.text.numbers import NOT_KNOWN, as_number, plain, plus_minus, signed

_UNIT = "nats per token"
_CHANGES = {
    "measured": "measured",
    "predicted": "predicted",
    "batch": "this batch",
    "momentum": "momentum",
    "weight_decay": "weight decay",
}
_PANELS = {"entropy": "entropy h", "measured": "measured Δh", "predicted": "predicted Δh"}


def headline(sides: Sequence[Side], point: Point | None) -> list[Tile]:
    """The tiles at the head of the page: the measured (or predicted) change of each side minus A's."""
    row = None if point is None else point.row("measured") or point.row("predicted")
    if row is None:
        return []
    return [
        Tile(f"{row.quantity.label}, {side.letter} minus A", _gap(gap), row.quantity.unit, "comparison.parquet")
        for side, gap in zip(sides, row.differences, strict=True)
        if gap is not None
    ]


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
    return Table("", columns, rows, "each side's run.json and sequences.parquet")


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
        columns += [
            (f"{side.letter} minus A", True),
            (f"{side.letter} minus A in standard errors", True),
            ("How", False),
        ]
    rows = []
    for row in point.rows:
        cells = [
            row.quantity.label,
            row.quantity.unit,
            *(_cell(number, row.quantity.is_change) for number in row.numbers),
        ]
        for gap in row.differences[1:]:
            cells += ["not known", "–", "–"] if gap is None else [_gap(gap), _distance(gap), _how(gap)]
        rows.append(cells)
    return Table(f"Values ± standard errors and differences{step}", columns, rows, "comparison.parquet")


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
    one, two = [effect.cosine for effect in same], [effect.cosine_other_prompts for effect in same]
    for label, cosines in (("one prompt", one), ("two prompts", two)):
        if any(cosine is not None for cosine in cosines):
            rows.append([f"Mean cosine of gradients, {label}", *(signed(cosine) for cosine in cosines)])
    columns = (("Quantity", False), *((side.letter, True) for side in sides))
    return Table("Numbers without a standard error, side by side", columns, rows, "each side's summary.json")


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
    source = "each side's summary.json: analyses.weighting_schemes"
    columns = (("Weighting", False), *((side.letter, True) for side in sides))
    return Table(f"Predicted change by weighting, each in a step as long as the run's, {_UNIT}", columns, table, source)


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
    return Table("Recorded settings that differ", columns, rows, "each side's run.json and summary.json")


def _setting(value: object) -> str:
    if value is None:
        return "not recorded"
    return plain(value) if as_number(value) is not None else one_line(str(value), 120)


def quantity_records(sides: Sequence[Side], point: Point) -> list[QuantityRecord]:
    """Every quantity for comparison.json."""
    return [_quantity_record([side.letter for side in sides], row) for row in point.rows]


def _quantity_record(letters: Sequence[str], row: Compared) -> QuantityRecord:
    name, part, estimator = tidy_names(row.quantity.key)
    pairs = zip(letters, row.numbers, strict=True)
    gaps = zip(letters, row.differences, strict=True)
    return QuantityRecord(
        quantity=name,
        part=part,
        estimator=estimator,
        label=row.quantity.label,
        unit=row.quantity.unit,
        values={
            letter: Mean(value=number and number.value, standard_error=number and number.standard_error)
            for letter, number in pairs
        },
        minus_a={
            letter: DifferenceRecord(
                **gap.number.model_dump(),
                paired_prompts=gap.prompts,
                why_unpaired=gap.reason or None,
                differs_from_zero=gap.differs_from_zero,
            )
            for letter, gap in gaps
            if gap is not None
        },
    )


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


def compared_checkpoints(sides: Sequence[Side], points: Sequence[Point]) -> ComparedCheckpoints:
    """Entropy, measured and predicted change over every side's checkpoints, with differences at the shared steps."""
    alone = [[compare_analyses([results]) for results in side.points] for side in sides]
    return ComparedCheckpoints(
        steps=[[float(point.step) for point in each] for each in alone],
        values={title: [[_value(point, name) for point in each] for each in alone] for name, title in _PANELS.items()},
        shared_steps=[float(point.step) for point in points],
        differences={
            title: [[_gap_of(point, name, k) for point in points] for k in range(1, len(sides))]
            for name, title in _PANELS.items()
        },
        labels=[side.label for side in sides],
    )


def compared_changes(sides: Sequence[Side], point: Point) -> ComparedChanges | None:
    """Changes of entropy by the analysed step; None where none is known."""
    rows = {title: row for name, title in _CHANGES.items() if (row := point.row(name)) is not None}
    if not rows:
        return None
    return ComparedChanges(
        names=list(rows),
        values=[[row.known(k) for row in rows.values()] for k in range(len(sides))],
        differences=[[row.gap(k) for row in rows.values()] for k in range(1, len(sides))],
        labels=[side.label for side in sides],
    )


def _value(point: Point, name: str) -> Known | None:
    row = point.row(name)
    return None if row is None else row.known(0)


def _gap_of(point: Point, name: str, place: int) -> Known | None:
    row = point.row(name)
    return None if row is None else row.gap(place)
