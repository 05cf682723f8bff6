"""The folder that `compare` writes: the page, its pictures, and the numbers for other programs.

comparison.html      verdict, figures, tables; needs no network     figures/*.png
comparison.parquet   a row a number (records.columns)
comparison.json      verdict, folders and the numbers of the last shared step
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from entropy_experiments.compare import tables
from entropy_experiments.compare.differences import Point, compare_sides
from entropy_experiments.compare.sides import Side, caveats, open_sides, step_of
from entropy_experiments.compare.verdict import comparison_verdict
from entropy_experiments.records.columns import COMPARED_NUMBERS, schema_of
from entropy_experiments.records.comparison_record import COMPARISON_FORMAT, ComparisonRecord, SideRecord
from entropy_experiments.records.outcome_record import SentenceRecord
from entropy_experiments.records.record import json_of
from entropy_experiments.records.writer import write_json
from entropy_experiments.report.content import Page, PageFigure, Section
from entropy_experiments.report.figures.comparison import (
    plot_compared_changes,
    plot_compared_checkpoints,
    plot_compared_histories,
)
from entropy_experiments.report.figures.style import page_figure
from entropy_experiments.report.interactive.comparison import compared_changes, compared_checkpoints, compared_histories
from entropy_experiments.report.interactive.drawing import Plot
from entropy_experiments.report.interactive.page import render_page
from entropy_experiments.statistics.confidence import Sentence
from rl_training.errors import UserError
from rl_training.files import refuse_link, replace_folder, strange_files, write_whole, write_whole_by
from rl_training.run.disk import disk_errors_explained
from rl_training.run.folder_lock import LOCK_NAME, locked

REPORT = "comparison.html"
_WRITTEN = (REPORT, "comparison.json", "comparison.parquet", "figures")
_READING = {
    "changes": (
        "Changes of entropy in the analysed step",
        "Each side, then each side minus A. Bars are 95% intervals: a difference whose bar crosses 0 is not "
        "significant.",
        "comparison.parquet: measured_change, predicted_change",
    ),
    "checkpoints": (
        "The analysed checkpoints",
        "What was found at each checkpoint, then the difference from A at the steps that both sides have.",
        "comparison.parquet: entropy, measured_change, predicted_change",
    ),
    "courses": (
        "Entropy and reward in training",
        "One line a run, on its own training buffers. There are no error bars: another seed would give another line.",
        "each side's training_history.json",
    ),
}


_HOW_TO_READ = (
    "A is what the others are compared with; every difference is the other side minus A. Where 0 lies outside a difference's 95% "
    "interval, the sides are taken to differ. “Paired over n prompts” means that both sides were measured on the same n "
    "evaluation prompts, so that what a prompt does to both cancels; “unpaired” differences have the squares of the two standard "
    "errors added up, and their intervals are too wide where some prompts are shared. Intervals cover the choice of evaluation "
    "prompts and completions: another training buffer, or another seed of training, would move the numbers too."
)


def write_comparison(paths: Sequence[Path | str], output: Path | str, overwrite: bool = False) -> ComparisonRecord:
    """Compare the folders and write `output`.

    Returns:
        What comparison.json holds.

    Raises:
        UserError: The folders cannot be compared (see .sides), or `output` exists and is not to be overwritten, or cannot be
            written to.
    """
    output = Path(output)
    with locked(output.with_name(f".{output.name}{LOCK_NAME}"), str(output)):
        _refuse_what_is_there(output, overwrite)
        sides = open_sides(paths)
        inside = next(
            (s for s in sides if output.resolve() == s.path.resolve() or output.resolve() in s.path.resolve().parents),
            None,
        )
        if inside is not None:
            raise UserError(f"--output {output} holds {inside.path}, which is compared: choose another --output")
        return _write(sides, output)


def _refuse_what_is_there(output: Path, overwrite: bool) -> None:
    """Raises UserError unless `output` is free, or what `compare` wrote and may replace."""
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists already: pass --overwrite to replace it, or choose another --output")
    if not (output / "comparison.json").is_file():
        raise UserError(
            f"{output} is not a folder that compare wrote, so it is not overwritten: choose another --output"
        )
    if strange := strange_files(output, _WRITTEN):
        raise UserError(
            f"{output} holds {strange[0]}, which compare did not write, so it is not overwritten: move that away"
        )


def _write(sides: Sequence[Side], output: Path) -> ComparisonRecord:
    points = compare_sides(sides)
    verdict = comparison_verdict(sides, points, caveats(sides, points[-1].analyses) if points else [])
    record = _record(sides, points, verdict)
    part = output.with_name(output.name + ".part")
    refuse_link(part)
    try:
        with disk_errors_explained(output, "writing the comparison"):
            if part.exists():
                shutil.rmtree(part)
            (part / "figures").mkdir(parents=True)
            figures = draw_comparison(sides, points)
            for figure in figures:
                write_whole(part / figure.file, figure.png)
            write_whole(part / REPORT, render_page(_page(sides, points, verdict, figures)))
            write_tidy(part / "comparison.parquet", sides, points)
            write_json(part / "comparison.json", json_of(record))
            replace_folder(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def _record(sides: Sequence[Side], points: Sequence[Point], verdict: Sequence[Sentence]) -> ComparisonRecord:
    return ComparisonRecord(
        format_version=COMPARISON_FORMAT,
        kind=sides[0].kind,
        sides=[SideRecord(letter=side.letter, name=side.name, folder=str(side.path)) for side in sides],
        shared_steps=[point.step for point in points] if sides[0].kind == "sweep" else None,
        verdict=[SentenceRecord.of(sentence) for sentence in verdict],
        quantities=tables.quantity_records(sides, points[-1]) if points else [],
    )


def draw_comparison(sides: Sequence[Side], points: Sequence[Point]) -> list[PageFigure]:
    """The figures, those without anything to show left out."""
    found: dict[str, tuple[Figure, Plot]] = {}
    if sides[0].kind == "sweep":
        checkpoints = tables.compared_checkpoints(sides, points)
        found["checkpoints"] = plot_compared_checkpoints(checkpoints), compared_checkpoints(checkpoints)
    if points and (changes := tables.compared_changes(sides, points[-1])) is not None:
        found["changes"] = plot_compared_changes(changes), compared_changes(changes)
    histories, labels = [side.points[-1].history for side in sides], [side.label for side in sides]
    if (courses := compared_histories(histories, labels)) is not None:
        found["courses"] = plot_compared_histories(histories, labels), courses
    return [
        page_figure(name, _READING[name], figure, plot, f"figures/{name}.png") for name, (figure, plot) in found.items()
    ]


def _page(
    sides: Sequence[Side], points: Sequence[Point], verdict: Sequence[Sentence], figures: Sequence[PageFigure]
) -> Page:
    heading = f"Comparison of {len(sides)} {'sweeps' if sides[0].kind == 'sweep' else 'analyses'}"
    last = points[-1] if points else None
    numbers = tables.comparison_tables(sides, points)
    sections = [
        Section(
            "sides", "What is compared", "folders, models, steps, buffers", tables=[tables.side_table(sides, last)]
        ),
        Section("figures", "Figures", "; ".join(figure.heading.lower() for figure in figures[1:]), figures=figures[1:]),
        Section(
            "tables", "Numbers side by side", "; ".join(table.caption.lower() for table in numbers), tables=numbers
        ),
        Section("reading", "How to read this", "what ± covers, and what “paired” means", text=_HOW_TO_READ),
    ]
    return Page(
        title=heading,
        heading=heading,
        about=f"{' · '.join(side.label for side in sides)}. A is what the others are compared with.",
        verdict=verdict,
        tiles=tables.headline(sides, last),
        lead_figure=figures[0] if figures else None,
        sections=[section for section in sections if section.figures or section.tables or section.text],
    )


def write_tidy(path: Path, sides: Sequence[Side], points: Sequence[Point]) -> None:
    """One row a number: values with `minus` null, differences with `minus` "A" and the prompts they are paired over."""
    rows = []
    for point in points:
        for row in point.rows:
            name, part, estimator = tables.tidy_names(row.quantity.key)
            for k, (side, results) in enumerate(zip(sides, point.analyses, strict=True)):
                common = {
                    "run": side.label,
                    "step": step_of(results),
                    "quantity": name,
                    "part": part,
                    "estimator": estimator,
                    "unit": row.quantity.unit,
                }
                number, gap = row.numbers[k], row.differences[k]
                if number is not None:
                    values = {"value": number.value, "standard_error": number.standard_error}
                    rows.append(common | values | {"minus": None, "paired_prompts": None})
                if gap is not None:
                    values = {"value": gap.value, "standard_error": gap.number.standard_error}
                    rows.append(common | values | {"minus": "A", "paired_prompts": gap.prompts})
    table = pa.Table.from_pylist(rows, schema=schema_of(COMPARED_NUMBERS))
    write_whole_by(path, lambda file: pq.write_table(table, file))
