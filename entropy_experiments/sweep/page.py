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

from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.figures.plots import caption_of
from entropy_experiments.report.interactive.checkpoint_slider import checkpoint_slider
from entropy_experiments.report.interactive.evolution import evolution_plot, kernel_plot, law_plot
from entropy_experiments.report.interactive.page import PageFigure, render_page
from entropy_experiments.statistics.confidence import ALIKE, shown
from entropy_experiments.sweep.figures import CHARTS
from entropy_experiments.sweep.verdict import write_sweep_verdict
from entropy_experiments.text.display import one_line
from entropy_experiments.text.numbers import plus_minus, value_and_error
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
    folder: Path,
    sweep: Mapping[str, Any],
    evolutions: Mapping[str, tuple[Mapping[str, Any], Sequence[ResultsFolder]]],
    figures: Mapping[str, Figure],
    pictures: Mapping[str, bytes],
) -> Path:
    """Write report.html into `folder` and return its path.

    sweep: the content of sweep.json. evolutions: run -> (`describe_evolution`, its checkpoints by step). figures, pictures:
    `<run>_<chart>` -> figure and its PNG.
    """
    found = {run: evolution for run, (evolution, _) in evolutions.items()}
    page_figures: dict[str, PageFigure] = {}
    runs = []
    for number, (run, (evolution, folders)) in enumerate(evolutions.items(), start=1):
        own = [_figure(number, run, chart, evolution, folders, figures, pictures) for chart in CHARTS]
        page_figures |= {figure.name: figure for figure in own}
        runs.append(
            {
                "id": f"run-{number}",
                "heading": "Figures" if len(evolutions) == 1 else one_line(run, 80),
                "comparable": evolution["comparable"]["sentence"],
                "figures": own,
            }
        )
    page = render_page(
        "sweep_report.html.j2",
        title=f"Entropy over training: {one_line(', '.join(found), 80)}",
        title_runs=one_line(", ".join(found), 160),
        figures=page_figures,
        verdict=[{"tone": sentence.tone, "text": sentence.text} for sentence in write_sweep_verdict(sweep, found)],
        headline=[tile for evolution in found.values() for tile in _headline(evolution)] if len(found) == 1 else [],
        done=sum(entry["status"] == "done" for entry in sweep["checkpoints"]),
        runs=runs,
        checkpoints=[_checkpoint(entry, found) for entry in sweep["checkpoints"]],
        provenance=_provenance(sweep),
    )
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _figure(
    number: int,
    run: str,
    chart: str,
    evolution: Mapping[str, Any],
    folders: Sequence[ResultsFolder],
    figures: Mapping[str, Figure],
    pictures: Mapping[str, bytes],
) -> PageFigure:
    name = f"{run}_{chart}"
    plots = {
        "evolution": lambda: evolution_plot(evolution),
        "law": lambda: law_plot(evolution["law"]["training"]),
        "kernel": lambda: kernel_plot(evolution),
        "kernels": lambda: checkpoint_slider(folders, evolution["checkpoints"]),
    }
    plot = plots[chart]() if chart in plots else None
    reading = f"{_TEXTS[chart][1]} {caption_of(figures[name])}" if plot is None else _TEXTS[chart][1]
    alt = caption_of(figures[name])
    return PageFigure(
        f"{chart}-{number}", _TEXTS[chart][0], reading, alt, pictures[name], plot, f"figures/{one_line(name, 80)}.png"
    )


def _headline(evolution: Mapping[str, Any]) -> list[dict[str, Any]]:
    whole, rows = evolution["whole"], evolution["checkpoints"]
    prediction = whole["prediction"]
    checks = sum(bool(row["failed_checks"]) for row in rows)
    agree = f"{prediction['agreeing']} of {prediction['compared']}" if prediction["compared"] else "not measured"
    moved = shown(whole["observed"]) if len(rows) > 1 else "one checkpoint"
    return [
        {"label": "Entropy over the run", "value": moved, "unit": "nats per token", "tone": ""},
        {
            "label": "Predicted steps added up",
            "value": shown(whole["expected"]),
            "unit": "nats per token",
            "tone": "",
        },
        {
            "label": "Next step predicted",
            "value": agree,
            "unit": f"checkpoints where it and the measurement {ALIKE}",
            "tone": "",
        },
        {
            "label": "Self-checks",
            "value": "all passed" if not checks else f"FAILED at {checks}",
            "unit": f"{len(rows)} checkpoints",
            "tone": "bad" if checks else "good",
        },
    ]


def _checkpoint(entry: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = found.get(entry["run"], {}).get("checkpoints", [])
    row = next((row for row in rows if row["step"] == entry["step"]), None)
    numbers = [None] * 4
    if row is not None:
        numbers = [row["entropy"], row["reward"], row["predicted"]["total"], row["actual"]]
    cells = []
    for place, number in enumerate(numbers):
        value, error = value_and_error(number)
        text = "" if row is None else plus_minus(value, error, plus=place > 1)
        cells.append({"text": text, "sort_by": "" if value is None else f"{value:.9g}"})
    failed = [*row["failed_checks"], *row["failed_analyses"]] if row else []
    done = entry["status"] == "done"
    return {
        "run": one_line(entry["run"], 60),
        "step": entry["step"],
        "cells": cells,
        "failed": bool(failed) or not done,
        "checks": "" if not row else f"FAILED: {', '.join(failed)}" if failed else "all passed",
        "link": quote(f"{entry['folder']}/report.html") if done else "",
        "why": one_line(entry["error"] or "not analysed yet", 300),
    }


def _provenance(sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = sweep["versions"]
    settings = sweep["config"]["entropy_analysis"]
    seconds = sum(entry["seconds"] or 0 for entry in sweep["checkpoints"])
    return [
        ("Made", str(sweep.get("created"))),
        ("Command", one_line(str(sweep.get("command")), 400)),
        *((f"Run {one_line(name, 60)}", one_line(path, 300)) for name, path in sweep["runs"].items()),
        ("Buffers", f"{settings['eval_batch_size']} evaluation and {settings['train_batch_size']} training sequences"),
        ("Seed", str(sweep["config"]["seed"])),
        ("Evaluation prompts", f"{settings['sampling']['eval_prompts']}, {settings['sampling']['eval_split']}"),
        ("Time of all analyses", f"{seconds / 60:.1f} minutes"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("Git commit", str(sweep.get("git_sha") or "none")),
    ]  # fmt: skip
