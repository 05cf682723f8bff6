"""What a person sees while a sweep runs: a bar over all its stages, then the verdict and a row for every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console

from entropy_experiments.console.analyze import expected_shares
from entropy_experiments.console.progress import StageProgress, progress_console
from entropy_experiments.console.tables import print_outcomes
from entropy_experiments.records.outcome_record import NoOutcome, Outcome, SentenceRecord, TriedCheckpoint
from entropy_experiments.records.record import json_of
from entropy_experiments.records.sweep_record import read_sweep
from entropy_experiments.report.outcome import read_outcome
from entropy_experiments.run.reporter import Reporter
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.run import Sweep, SweepOptions, run_sweep
from entropy_experiments.sweep.verdict import read_sweep_verdict
from entropy_experiments.text.numbers import counted
from rl_training.errors import UserError


def sweep_with_progress(
    runs: Sequence[Path],
    config: SweepConfig,
    *,
    quiet: bool = False,
    table: bool = True,
    **options: Unpack[SweepOptions],
) -> Sweep:
    """run_sweep with progress on stderr and, where `table` is set, the closing verdict and table there as well."""
    console = progress_console(quiet)
    with _SweepProgress(console, config) as progress:
        sweep = run_sweep(runs, config, reporter=progress, **options)
    if table and not quiet:
        _close(console, sweep)
    return sweep


class _SweepProgress(Reporter):
    """Opens the bar with the first checkpoint, when it is known how many there are."""

    def __init__(self, console: Console, config: SweepConfig) -> None:
        self._console, self._config = console, config
        self._stack = ExitStack()
        self._progress: StageProgress | None = None

    def __enter__(self) -> _SweepProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def checkpoint(self, name: str, place: int, count: int) -> None:
        if self._progress is None:
            shares = expected_shares(self._config.of_a_checkpoint())
            self._progress = self._stack.enter_context(StageProgress(self._console, shares, runs=count, label="sweep"))
        self._progress.checkpoint(name, place, count)
        self._line(f"{name} ({place} of {count})")

    def stage(self, name: str) -> None:
        if self._progress is None:
            self._line(name)
        else:
            self._progress.stage(name)

    def note(self, line: str) -> None:
        self.stage(line)

    def _line(self, text: str) -> None:
        if not self._console.is_interactive:
            self._console.print(f"sweep: {text}", markup=False, soft_wrap=True)


def sweep_outcome(sweep: Sweep) -> dict[str, Any]:
    """What `--json` prints: folder, report, process, failed, open, and of a sweep that is put together verdict and checkpoints.

    A checkpoint is an `Outcome` or `NoOutcome` with its "run".
    """
    found: dict[str, Any] = {
        "folder": str(sweep.folder),
        "report": None if sweep.report is None else str(sweep.report),
        "process": {"number": sweep.shard.index + 1, "of": sweep.shard.count},
        "failed": sweep.failed,
        "open": list(sweep.open),
        "verdict": [],
        "checkpoints": [],
    }
    if sweep.report is not None:
        found["verdict"] = [json_of(SentenceRecord.of(sentence)) for sentence in read_sweep_verdict(sweep.folder)]
        found["checkpoints"] = [{"run": run, **json_of(outcome)} for run, outcome in _outcomes(sweep.folder)]
    return found


def _outcomes(folder: Path) -> list[tuple[str, Outcome | NoOutcome]]:
    """(run, outcome) of every checkpoint of a sweep that was put together."""
    found: list[tuple[str, Outcome | NoOutcome]] = []
    for entry in read_sweep(folder).checkpoints:
        if entry.missing is None:
            found.append((entry.run, read_outcome(folder / entry.folder)))
        else:
            checkpoint = TriedCheckpoint(path=entry.checkpoint, step=entry.step)
            found.append((entry.run, NoOutcome(checkpoint=checkpoint, error=entry.missing)))
    return found


def _close(console: Console, sweep: Sweep) -> None:
    if sweep.shard.count > 1:
        console.print(f"{sweep.shard.describe()} is done.", markup=False)
    if sweep.report is None:
        if sweep.open:
            who = "the first process waits for them and" if sweep.shard.kind == "rank" else "the last of them"
            text = f"{counted(len(sweep.open), 'checkpoint')} of other processes not done yet: {who} puts the results together"
            console.print(
                f"{text}{'' if sweep.shard.kind == 'rank' else ', or --assemble does'}.", markup=False, soft_wrap=True
            )
        return
    outcomes = _outcomes(sweep.folder)
    for run in dict.fromkeys(run for run, _ in outcomes):
        console.print(f"\n{run}", markup=False, style="bold")
        print_outcomes(console, [outcome for name, outcome in outcomes if name == run])
    console.print()
    for sentence in read_sweep_verdict(sweep.folder):
        console.print(f"- {sentence.text}", markup=False, soft_wrap=True)


def refuse_failures(sweep: Sweep) -> None:
    """Raises UserError where checkpoints failed and this process is the one to say so, once everything else is done.

    A launched process other than the first stays silent: its launcher would stop the others.
    """
    own = {target.name for target in sweep.shard.of(sweep.targets)}
    told = sweep.failed.keys() if sweep.report is not None or sweep.shard.count == 1 else own & sweep.failed.keys()
    if not told or (sweep.shard.kind == "rank" and sweep.shard.index > 0):
        return
    first = sorted(told)[0]
    more = f" (and {len(told) - 1} more, see sweep.json)" if len(told) > 1 else ""
    done = len(sweep.targets) - len(sweep.failed) - len(sweep.open)
    raise UserError(
        f"{len(told)} of {counted(len(sweep.targets), 'checkpoint')} could not be analysed, {done} are done in "
        f"{sweep.folder}; {first}: {sweep.failed[first]}{more}. Mend and pass --resume"
    )
