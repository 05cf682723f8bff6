"""What a person sees while training runs, and the file that keeps it: one row a step."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl_training.files import append_line, write_whole
from rl_training.intervals import t_quantile


class MetricsFile(TrainerCallback):
    """Appends everything that is logged to a JSON-lines file, flushed line by line; a resumed run drops later lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self._path.exists():
            kept = [
                line for line in self._path.read_text(encoding="utf-8").splitlines() if _step(line) <= state.global_step
            ]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if state.is_world_process_zero and "loss" in logs:
            append_line(self._path, json.dumps({"step": state.global_step, **logs}))


def _step(line: str) -> float:
    """The step of a line; infinite for one that was cut short when the run was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


def _number(value: float | None, form: str) -> str:
    """A number that may be missing or not finite (loggers turn NaN into None)."""
    if value is None or not math.isfinite(value):
        return "n/a".rjust(len(format(0.0, form)))
    return format(value, form)


_PROBE_COLUMNS = f" {'predicted ± 95%':>18} {'measured ± 95%':>18} {'batch':>8} {'moment.':>8}"


def _probe_values(logs: dict[str, Any]) -> dict[str, float]:
    prefix = "entropy_probe/"
    return {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}


def _probe_cells(probe: dict[str, float]) -> str:
    """The cells under `_PROBE_COLUMNS`; what a step was not probed for stands as n/a."""
    predicted, measured = (
        f"{_number(probe.get(name), '>+8.4f')} ± {_number(_reach(probe, name), '>6.4f')}"
        for name in ("predicted", "measured")
    )
    measured = f"{measured:>18}"
    if probe.get("low_ess"):  # of a logged row's steps one at least
        measured = f"[dim]{measured}[/dim]"
    parts = (probe.get(name, probe.get(f"measured_{name}")) for name in ("batch", "momentum"))
    return " ".join([f" {predicted:>18}", measured, *(_number(part, ">+8.4f") for part in parts)])


def _reach(probe: dict[str, float], name: str) -> float | None:
    """Half the width of the 95% interval: Student's, so that of four folds it is 3.2 standard errors and not 2."""
    error, freedom = probe.get(f"{name}_se"), probe.get(f"{name}_df")
    return None if error is None or freedom is None else t_quantile(freedom) * error


def _low_ess(probe: dict[str, float]) -> str:
    """The words beside a measurement that is not to be trusted."""
    return "  [dim]measured: low ESS[/dim]" if probe.get("low_ess") else ""


class ProbeConsole(TrainerCallback):
    """For a trainer with a console of its own: what the probe needs, and one line a logged step on standard error."""

    def __init__(self, statement: str) -> None:
        self._statement = statement
        self._console = Console(file=sys.stderr, highlight=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._write(self._statement)
            self._write(f"{'step':>5} {'entropy':>8}{_PROBE_COLUMNS} {'ess':>6}   (nats per token)")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        probe = _probe_values(kwargs.get("logs") or {})
        if state.is_world_process_zero and probe:
            line = f"{state.global_step:>5} {_number(probe.get('entropy'), '>8.3f')}{_probe_cells(probe)}"
            self._write(f"{line} {_number(probe.get('ess'), '>6.1f')}{_low_ess(probe)}")

    def _write(self, text: str) -> None:
        """A line above the trainer's progress bar, which is drawn again below it."""
        with self._console.capture() as rendered:
            self._console.print(text, soft_wrap=True)
        tqdm.write(rendered.get(), file=sys.stderr, end="")


class ConsoleCallback(TrainerCallback):
    """A progress bar with time left, and one line a step: entropy, reward, predicted and measured change."""

    def __init__(self, description: str, probe: bool) -> None:
        self._description, self._probe = description, probe
        self._console = Console(file=sys.stderr, highlight=False)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("training", total=None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._console.print(self._description, soft_wrap=True)
        columns = f"{'step':>5} {'entropy':>8} {'reward':>7} {'buffer':>14}"
        if self._probe:
            columns += _PROBE_COLUMNS
        what = "entropies in nats per token; buffer: sequences kept of those drawn"
        what += "; batch, moment.: parts of predicted" if self._probe else ""
        self._console.print(what, soft_wrap=True)
        self._console.print(columns + f" {'sec':>5}", soft_wrap=True)
        self._progress.start()
        self._progress.update(self._bar, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        probe = _probe_values(logs)
        kept, made = logs.get("buffer/trained") or 0, logs.get("buffer/generated") or 0
        entropy = _number(probe.get("entropy", logs.get("entropy")), ">8.3f")
        reward = _number(logs.get("buffer/reward_first_round", logs.get("reward")), ">7.2f")
        line = f"{state.global_step:>5} {entropy} {reward} {f'{kept:.0f} of {made:.0f}':>14}"
        if probe:
            line += _probe_cells(probe)
        self._console.print(line + f" {_number(logs.get('step_time'), '>5.0f')}{_low_ess(probe)}", soft_wrap=True)
        self._progress.update(self._bar, completed=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; harmless when called twice."""
        self._progress.stop()
