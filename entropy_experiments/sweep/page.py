"""One page that says what a sweep found: verdict, figures over training, a slider over checkpoints, a table that leads to each
checkpoint's own report.

The page needs no network; what a model or a file contributed is shown as text. The same folder gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.evolution import CheckpointRow, Evolution
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.sweep_record import SweepEntry, SweepRecord
from entropy_experiments.report.cells import explained
from entropy_experiments.report.content import Cell, Page, PageFigure, Section, Table, Tile
from entropy_experiments.report.evolution_words import comparable_sentence
from entropy_experiments.report.figures.style import caption_of, page_figure
from entropy_experiments.report.interactive.checkpoint_slider import checkpoint_slider
from entropy_experiments.report.interactive.drawing import Plot
from entropy_experiments.report.interactive.evolution import evolution_plot, kernel_plot, law_plot
from entropy_experiments.statistics.confidence import ALIKE, measured_cell
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.figures import CHARTS, Runs, draw_sweep_figures
from entropy_experiments.sweep.verdict import write_sweep_verdict
from entropy_experiments.text.display import one_line

_ABOUT = (
    "Entropy says how undecided the model is about its next token; when it drains away, exploration ends. This page: what "
    "entropy did over the run, whether the changes of it by the analysed steps were predicted, what caused them, and how the "
    "Fisher kernel changed."
)
_TEXTS = {
    "evolution": (
        "Entropy, reward, and the change that each next step makes",
        "Top: entropy and mean reward on the evaluation prompts, the same at every checkpoint. Third: what the next step from "
        "each checkpoint was predicted to do, whole and by its parts, beside what it was measured to do. Bottom: predictions "
        "added up since the first checkpoint, beside what entropy did. The run took its own batches, predictions are "
        "of one fresh batch.",
    ),
    "changes": (
        "What moved entropy over the run",
        "The lower two panels of “Entropy, reward, and the change that each next step makes” as a picture of their own.",
    ),
    "law": (
        "Reward against entropy",
        "Every point is a training step. The curve is R = −a·e^H + b; its left end, at H = 0, is the reward that is left once "
        "all entropy is spent. Dashed: the curve that the first third of the run alone would have given. A run that spends "
        "entropy for reward moves to the upper left along it.",
    ),
    "kernel": (
        "The Fisher kernel over the run",
        "Size of an entry, how many directions the gradients point in, how much of the likeness of training gradients stays "
        "within prompts, and whether successive kernels couple the same evaluation prompts (0: no more than chance, 1: alike).",
    ),
    "kernels": (
        "Kernel and shares, checkpoint by checkpoint",
        "Move the slider through the checkpoints. Above: the Fisher kernel, both axes by prompt. Below: each training "
        "sequence's share of the change of entropy. Colours end at each checkpoint's own limit: compare patterns, not sizes.",
    ),
    "clusters": (
        "Clusters of training gradients",
        "Do clusters at one checkpoint move the same evaluation prompts as clusters at the next, and do prompts stay in theirs?",
    ),
}


_SOURCES = {
    "evolution": "evolution.json: checkpoints, path",
    "changes": "evolution.json: checkpoints, path",
    "law": "evolution.json: law.training",
    "kernel": "evolution.json: checkpoints, changes",
    "kernels": "checkpoints/*/kernel.safetensors: fisher; checkpoints/*/sequences.parquet: delta_h",
    "clusters": "evolution.json: changes",
}


def sweep_figures(evolutions: Runs) -> dict[str, list[PageFigure]]:
    """Every run's figures in the order of the page, with their files under figures/."""
    drawn = draw_sweep_figures(evolutions)
    found: dict[str, list[PageFigure]] = {}
    for number, (run, (evolution, folders)) in enumerate(evolutions.items(), start=1):
        plots, found[run] = _plots(evolution, folders), []
        for chart in CHARTS:
            figure, (heading, reading), file = drawn[f"{run}_{chart}"], _TEXTS[chart], f"{run}_{chart}.png"
            reading = reading if chart in plots else f"{reading} {caption_of(figure)}"
            words = heading, reading, _SOURCES[chart]
            found[run].append(page_figure(f"{chart}-{number}", words, figure, plots.get(chart), f"figures/{file}"))
    return found


def sweep_page(
    sweep: SweepRecord, evolutions: Mapping[str, Evolution], figures: Mapping[str, list[PageFigure]]
) -> Page:
    """The page of a sweep. figures: as from `sweep_figures`."""
    done, runs, one = sum(e.status == "done" for e in sweep.checkpoints), ", ".join(evolutions), len(evolutions) == 1
    lead = next(iter(figures.values()))[0] if one else None
    return Page(
        title=f"Entropy over training: {one_line(runs, 80)}",
        heading=f"Entropy over training: {one_line(runs, 160)}",
        about=f"{done} of {len(sweep.checkpoints)} checkpoints, analysed alike. {_ABOUT}",
        verdict=write_sweep_verdict(sweep, evolutions),
        tiles=[tile for evolution in evolutions.values() for tile in _headline(evolution)] if one else [],
        lead_figure=lead,
        sections=[
            *(
                Section(
                    f"run-{number}",
                    "Figures" if one else one_line(run, 80),
                    "the parts of each step; the law; the kernels, checkpoint by checkpoint",
                    text=comparable_sentence(evolution),
                    figures=[figure for figure in figures[run] if figure is not lead],
                )
                for number, (run, evolution) in enumerate(evolutions.items(), start=1)
            ),
            Section(
                "checkpoints",
                "Checkpoints",
                "a row each, with its own report",
                tables=[_checkpoints(sweep.checkpoints, evolutions)],
            ),
            Section(
                "provenance",
                "Provenance",
                "runs, command, buffers, versions, minutes",
                tables=[_provenance(sweep)],
            ),
        ],
    )


def _plots(evolution: Evolution, folders: Sequence[ResultsFolder]) -> dict[str, Plot]:
    plots = {
        "evolution": evolution_plot(evolution),
        "law": law_plot(evolution.law.training),
        "kernel": kernel_plot(evolution),
        "kernels": checkpoint_slider(folders, evolution.checkpoints),
    }
    return {chart: plot for chart, plot in plots.items() if plot is not None}


def _headline(evolution: Evolution) -> list[Tile]:
    whole, rows, prediction = evolution.whole, evolution.checkpoints, evolution.whole.prediction
    failed = sum(bool(row.failed_checks) for row in rows)
    agree = f"{prediction.agreeing} of {prediction.compared}" if prediction.compared else "not measured"
    moved = whole.observed.shown() if len(rows) > 1 else "one checkpoint"
    passed, tone = (f"FAILED at {failed}", "bad") if failed else ("all passed", "good")
    unit, source = "nats per token", "evolution.json: whole"
    compared = f"checkpoints where it and the measurement {ALIKE}"
    return [
        Tile("Entropy over the run", moved, unit, f"{source}.observed"),
        Tile("Predicted steps added up", whole.expected.shown(), unit, f"{source}.expected"),
        Tile("Next step predicted", agree, compared, f"{source}.prediction"),
        Tile("Self-checks", passed, f"{len(rows)} checkpoints", "evolution.json: checkpoints, failed_checks", tone),
    ]


def _checkpoints(entries: Sequence[SweepEntry], evolutions: Mapping[str, Evolution]) -> Table:
    rows_of = {(run, row.step): row for run, found in evolutions.items() for row in found.checkpoints}
    pairs = [(entry, rows_of.get((entry.run, entry.step))) for entry in entries]
    numbers = ("Step", "Entropy", "Mean reward", "Predicted Δh", "Measured Δh")
    rows = [_checkpoint(entry, row) for entry, row in pairs]
    return Table(
        explained("Every checkpoint with its own report. Entropies and their changes in nats per token.", rows),
        [("Run", False), *((heading, True) for heading in numbers), ("Checks", False), ("Report", False)],
        rows,
        "evolution.json: checkpoints; states from sweep.json",
        noun="checkpoints",
        failed=frozenset(
            place
            for place, (entry, row) in enumerate(pairs)
            if entry.missing is not None or (row is not None and row.failed)
        ),
    )


def _checkpoint(entry: SweepEntry, row: CheckpointRow | None) -> list[str | Cell]:
    numbers: list[Estimate | None] = [None] * 4
    if row is not None:
        total = None if row.predicted is None else row.predicted.total
        numbers = [row.entropy, row.reward, total, row.actual]
    cells = []
    for place, number in enumerate(numbers):
        value, error = (None, None) if number is None else (number.value, number.standard_error)
        trusted = None if row is None or number is not row.actual else row.trustworthy
        text = "" if row is None else measured_cell(value, error, trusted, plus=place > 1)
        cells.append(Cell(text, "" if value is None else f"{value:.9g}"))
    checks = "" if row is None else f"FAILED: {', '.join(row.failed)}" if row.failed else "all passed"
    report = Cell("report", link=quote(f"{entry.folder}/report.html"))
    if entry.missing is not None:
        report = Cell(one_line(entry.missing, 300))
    return [one_line(entry.run, 60), Cell(str(entry.step), str(entry.step)), *cells, checks, report]


def _provenance(sweep: SweepRecord) -> Table:
    config = SweepConfig.model_validate(sweep.config)
    analysis = config.entropy_analysis
    seconds = sum(entry.seconds or 0 for entry in sweep.checkpoints)
    facts = [
        ("Made", sweep.created),
        ("Command", one_line(sweep.command, 400)),
        *((f"Run {one_line(name, 60)}", one_line(path, 300)) for name, path in sweep.runs.items()),
        ("Buffers", f"{analysis.eval_batch_size} evaluation and {analysis.train_batch_size} training sequences"),
        ("Seed", str(config.seed)),
        ("Evaluation prompts", f"{analysis.sampling.eval_prompts}, {analysis.sampling.eval_split}"),
        ("Time of all analyses", f"{seconds / 60:.1f} minutes"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in sweep.versions.items())),
        ("Git commit", sweep.git_sha or "none"),
    ]  # fmt: skip
    return Table("", (), facts, "sweep.json")
