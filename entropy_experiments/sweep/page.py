"""One page that says what a sweep found: verdict, figures over training, a slider over checkpoints, a table that leads to each
checkpoint's own report.

The page needs no network; what a model or a file contributed is shown as text. The same folder gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.sweep_record import SweepEntry, SweepRecord
from entropy_experiments.report.evolution_words import comparable_sentence
from entropy_experiments.report.figures.plots import caption_of
from entropy_experiments.report.interactive.checkpoint_slider import checkpoint_slider
from entropy_experiments.report.interactive.drawing import Plot
from entropy_experiments.report.interactive.evolution import evolution_plot, kernel_plot, law_plot
from entropy_experiments.report.interactive.page import PageFigure, render_page
from entropy_experiments.statistics.confidence import ALIKE
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.figures import CHARTS, Runs
from entropy_experiments.sweep.verdict import write_sweep_verdict
from entropy_experiments.text.display import one_line
from entropy_experiments.text.numbers import plus_minus
from rl_training.files import write_whole

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
        "The same as two pictures for paper: the parts of every next step, and the path of entropy.",
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


def write_sweep_report(
    folder: Path, sweep: SweepRecord, evolutions: Runs, figures: Mapping[str, Figure], pictures: Mapping[str, bytes]
) -> Path:
    """Write report.html into `folder` and return its path. figures, pictures: `<run>_<chart>` -> figure and its PNG."""
    found = {run: evolution for run, (evolution, _) in evolutions.items()}
    page_figures: dict[str, PageFigure] = {}
    runs = []
    for number, (run, (evolution, folders)) in enumerate(evolutions.items(), start=1):
        plots = _plots(evolution, folders)
        drawn = [
            _figure(f"{chart}-{number}", f"{run}_{chart}", chart, plots.get(chart), figures, pictures)
            for chart in CHARTS
        ]
        page_figures |= {figure.name: figure for figure in drawn}
        runs.append(
            {
                "id": f"run-{number}",
                "heading": "Figures" if len(evolutions) == 1 else one_line(run, 80),
                "comparable": comparable_sentence(evolution),
                "figures": drawn,
            }
        )
    page = render_page(
        "sweep_report.html.j2",
        title=f"Entropy over training: {one_line(', '.join(found), 80)}",
        title_runs=one_line(", ".join(found), 160),
        figures=page_figures,
        verdict=[{"tone": sentence.tone, "text": sentence.text} for sentence in write_sweep_verdict(sweep, found)],
        headline=[tile for evolution in found.values() for tile in _headline(evolution)] if len(found) == 1 else [],
        done=sum(entry.status == "done" for entry in sweep.checkpoints),
        runs=runs,
        checkpoints=[_checkpoint(entry, found.get(entry.run)) for entry in sweep.checkpoints],
        provenance=_provenance(sweep),
    )
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _plots(evolution: Evolution, folders: Sequence[ResultsFolder]) -> dict[str, Plot | None]:
    return {
        "evolution": evolution_plot(evolution),
        "law": law_plot(evolution.law.training),
        "kernel": kernel_plot(evolution),
        "kernels": checkpoint_slider(folders, evolution.checkpoints),
    }


def _figure(
    name: str, file: str, chart: str, plot: Plot | None, figures: Mapping[str, Figure], pictures: Mapping[str, bytes]
) -> PageFigure:
    heading, reading = _TEXTS[chart]
    alt = caption_of(figures[file])
    reading = f"{reading} {alt}" if plot is None else reading
    return PageFigure(name, heading, reading, alt, pictures[file], plot, f"figures/{one_line(file, 80)}.png")


def _headline(evolution: Evolution) -> list[dict[str, Any]]:
    whole, rows, prediction = evolution.whole, evolution.checkpoints, evolution.whole.prediction
    checks = sum(bool(row.failed_checks) for row in rows)
    agree = f"{prediction.agreeing} of {prediction.compared}" if prediction.compared else "not measured"
    moved = whole.observed.shown() if len(rows) > 1 else "one checkpoint"
    compared = f"checkpoints where it and the measurement {ALIKE}"
    passed = "all passed" if not checks else f"FAILED at {checks}"
    return [
        {"label": "Entropy over the run", "value": moved, "unit": "nats per token", "tone": ""},
        {"label": "Predicted steps added up", "value": whole.expected.shown(), "unit": "nats per token", "tone": ""},
        {"label": "Next step predicted", "value": agree, "unit": compared, "tone": ""},
        {
            "label": "Self-checks",
            "value": passed,
            "unit": f"{len(rows)} checkpoints",
            "tone": "bad" if checks else "good",
        },
    ]


def _checkpoint(entry: SweepEntry, evolution: Evolution | None) -> dict[str, Any]:
    rows = () if evolution is None else evolution.checkpoints
    row = next((row for row in rows if row.step == entry.step), None)
    numbers: list[Estimate | None] = [None] * 4
    if row is not None:
        total = None if row.predicted is None else row.predicted.total
        numbers = [row.entropy, row.reward, total, row.actual]
    cells = []
    for place, number in enumerate(numbers):
        value, error = (None, None) if number is None else (number.value, number.standard_error)
        text = "" if row is None else plus_minus(value, error, plus=place > 1)
        cells.append({"text": text, "sort_by": "" if value is None else f"{value:.9g}"})
    failed = [] if row is None else row.failed
    return {
        "run": one_line(entry.run, 60),
        "step": entry.step,
        "cells": cells,
        "failed": bool(failed) or entry.missing is not None,
        "checks": "" if row is None else f"FAILED: {', '.join(failed)}" if failed else "all passed",
        "link": "" if entry.missing is not None else quote(f"{entry.folder}/report.html"),
        "why": one_line(entry.missing or "", 300),
    }


def _provenance(sweep: SweepRecord) -> list[tuple[str, str]]:
    config = SweepConfig.model_validate(sweep.config)
    analysis = config.entropy_analysis
    seconds = sum(entry.seconds or 0 for entry in sweep.checkpoints)
    return [
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
