"""Putting a sweep together: evolution, table, figures, report, and sweep.json last.

Written anew each time from the finished analyses; a sweep whose checkpoints are not all done says which are missing, and why.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.history import training_history
from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.records.record import json_of
from entropy_experiments.records.sweep_record import SWEEP_FORMAT, SweepEntry, SweepRecord
from entropy_experiments.records.writer import describe_environment, write_json
from entropy_experiments.report.interactive.page import render_page
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.evolution.evolution import describe_evolution
from entropy_experiments.sweep.folder import SweepFolder
from entropy_experiments.sweep.page import sweep_figures, sweep_page
from entropy_experiments.sweep.targets import Target
from entropy_experiments.sweep.tidy_table import write_table
from rl_training.errors import UserError
from rl_training.files import own_folder, write_whole
from rl_training.run.sums import SUMS_NAME, write_sums

_BAND_SEED = 0
_DATA = ("evolution.json", "results.parquet", "sweep.json")


def assemble_sweep(
    place: SweepFolder, runs: dict[str, Path], targets: Sequence[Target], config: SweepConfig
) -> Path | None:
    """Write evolution.json, results.parquet, figures/, report.html and sweep.json.

    Returns:
        The report's path, None without any result.

    Raises:
        UserError: A run's log cannot be read.
    """
    entries, by_run = _read_all(place, targets)
    evolutions: dict[str, tuple[Evolution, list[ResultsFolder]]] = {}
    for run, folders in by_run.items():
        log = training_history(read_metrics(runs[run] / "metrics.jsonl"))
        history = max([log, *(results.history for results in folders)], key=len)
        evolutions[run] = (describe_evolution(folders, history, seed=_BAND_SEED), folders)
    sweep = SweepRecord(
        format_version=SWEEP_FORMAT,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=" ".join(sys.argv),
        **describe_environment(),
        runs={name: str(path) for name, path in runs.items()},
        complete=all(entry.status == "done" for entry in entries),
        checkpoints=entries,
        config=config.model_dump(mode="json"),
    )
    report = None
    (place.path / SUMS_NAME).unlink(missing_ok=True)  # of an earlier assembly, whose files are about to be replaced
    if evolutions:
        write_json(
            place.path / "evolution.json", {run: json_of(evolution) for run, (evolution, _) in evolutions.items()}
        )
        write_table(place.path / "results.parquet", evolutions)
        figures = sweep_figures(evolutions)
        own_folder(place.path / "figures")
        for figure in (one for of_a_run in figures.values() for one in of_a_run):
            write_whole(place.path / figure.file, figure.png)
        found = {run: evolution for run, (evolution, _) in evolutions.items()}
        report = place.path / "report.html"
        write_whole(report, render_page(sweep_page(sweep, found, figures)))
    write_json(place.sweep_file, json_of(sweep))
    write_sums(place.path, [name for name in _DATA if (place.path / name).is_file()])
    return report


def _read_all(place: SweepFolder, targets: Sequence[Target]) -> tuple[list[SweepEntry], dict[str, list[ResultsFolder]]]:
    """An entry of sweep.json for every target, and what could be read, by run and step."""
    entries, by_run = [], {}
    for target in sorted(targets, key=lambda t: (t.run, t.step)):
        status, error, seconds = place.outcome(target), None, None
        if status == "done":
            try:
                results = read_results_folder(place.results(target))
                by_run.setdefault(target.run, []).append(results)
                seconds = results.run.seconds
            except UserError as broken:
                status, error = "unreadable", str(broken)
        else:
            error = (place.error_of(target) or {}).get("error")
        entries.append(
            SweepEntry(
                name=target.name,
                run=target.run,
                step=target.step,
                checkpoint=str(target.path),
                folder=f"checkpoints/{target.name}",
                status=status,
                error=error,
                seconds=seconds,
            )
        )
    return entries, by_run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl, one mapping a step, the last line of a step that was trained twice; [] where there is none.

    A last line that was cut short, by a kill, is left out. Raises UserError for any other line that is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}, is not JSON ({error}): repair or remove the line") from error
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            by_step[entry["step"]] = {**by_step.get(entry["step"], {}), **entry}
    return [by_step[step] for step in sorted(by_step)]
