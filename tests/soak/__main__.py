"""`make soak`: thousands of steps, hundreds of analyses and reports in one process; what grows is told from what does not.

    python -m tests.soak [--steps 2000] [--analyses 200] [--reports 50] [--write NAME]

Of memory (resident, after a collection of garbage), open handles, threads and time of each repetition: the slope over all but
the first quarter, with a 95% interval that allows for neighbours that err alike. The exit status is 1 where memory, handles or
threads grow by more than that and more than `ALLOWED`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from tests.soak.slopes import Slope, slope

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults"
QUANTITIES = ("memory, kB", "handles", "threads", "seconds")
ALLOWED = {"memory, kB": 20.0, "handles": 0.01, "threads": 0.01}
"""Growth a repetition below which a run of a million steps is none the worse: 20 kB a step would be 20 GB, so most of it is the
allocator's; the trainer's own log, which it keeps in memory, takes some 5 kB a step."""
_FEW = (
    "entropy_analysis.eval_batch_size=8",
    "entropy_analysis.train_batch_size=8",
    "entropy_analysis.analysis.step_scales=[1.0]",
)
"""Analyses that are over soon; their pages, which are two thirds of the work, are painted in the series of reports alone."""


@dataclass
class Series:
    """Values after each repetition, by quantity. kept: where they are written now and then."""

    name: str
    kept: Path | None = None
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    _process: psutil.Process = field(default_factory=psutil.Process)
    _last: float = field(default_factory=time.process_time)

    def note(self, collect: bool) -> None:
        """A repetition has ended."""
        seconds, _ = time.process_time() - self._last, gc.collect() if collect else 0
        found = (self._process.memory_info().rss / 1024, self._process.num_fds(), threading.active_count(), seconds)
        for name, value in zip(QUANTITIES, found, strict=True):
            self.values[name].append(float(value))
        if self.kept is not None and len(self.values["seconds"]) % 20 == 0:
            self.kept.write_text(json.dumps({"name": self.name, "values": self.values}))
        self._last = time.process_time()

    def slopes(self) -> dict[str, Slope]:
        return {name: slope(values) for name, values in self.values.items()}


class _Steps(TrainerCallback):
    def __init__(self, series: Series) -> None:
        self._series = series

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._series.note(state.global_step % 10 == 0)


def soak(root: Path, steps: int, analyses: int, reports: int, kept: Path | None = None) -> list[Series]:
    """The three series, one after the other in this process. kept: a folder for them."""
    import rl_training.train
    from entropy_experiments.buffers import recorded_task
    from entropy_experiments.entropy_runner import run_fisher_analysis
    from entropy_experiments.report.page import write_report
    from rl_training.train import run_training
    from tests.entropy_experiments.small_analysis import config
    from tests.faults.undisturbed import sums
    from tests.tiny_policy import save_tiny_policy, tiny_train_config
    from tests.unpainted import paint, paint_nothing

    recorded_task.why_trust_is_needed = lambda task: None

    def series_of(name: str) -> Series:
        return Series(name, None if kept is None else kept / f"{name}.json")

    build, trained = rl_training.train.build_trainer, series_of("steps of training")

    def built(settings: Any) -> Any:
        trainer, task = build(settings)
        trainer.add_callback(_Steps(trained))
        return trainer, task

    rl_training.train.build_trainer = built
    small = {"prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_length": 6}
    run = run_training(
        tiny_train_config(
            save_tiny_policy(root / "policy"), root / "run", training={"steps": steps, "save_every": max(1, steps // 4)},
            rollouts=small, optimizer={"learning_rate": 1e-5, "micro_batch_size": 8}, entropy_probe={"eval_sequences": 8},
            task=sums(root / "sums.jsonl"),
        ), quiet=True,
    )  # fmt: skip
    series, few = [trained], config(*_FEW)
    work: list[tuple[str, int, Callable[[], None], Callable[[int], object]]] = [
        (
            "analyses",
            analyses,
            paint_nothing,
            lambda k: run_fisher_analysis(run, few, folder=root / "results", overwrite=k > 0),
        ),
        ("reports", reports, paint, lambda k: write_report(root / "results")),
    ]
    for name, count, before, act in work:
        before()
        found = series_of(name)
        for number in range(count):
            act(number)
            found.note(True)
        series.append(found)
    return series


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.soak")
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--analyses", type=int, default=200)
    options.add_argument("--reports", type=int, default=50)
    options.add_argument("--kept", type=Path, help="a folder to which series are written now and then")
    options.add_argument("--page-of", type=Path, help="make the page of such a folder, and nothing else")
    options.add_argument("--write", default="", metavar="NAME", help="write benchmarks/results/faults/NAME.md")
    asked = options.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if asked.kept is not None:
        asked.kept.mkdir(parents=True, exist_ok=True)
    if asked.page_of is not None:
        paths = sorted(asked.page_of.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return _told([Series(**json.loads(path.read_text())) for path in paths], asked.write)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), open(os.devnull, "w") as null:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            found = soak(Path(folder), asked.steps, asked.analyses, asked.reports, asked.kept)
    return _told(found, asked.write)


def _told(found: list[Series], name: str) -> int:
    text, grows = page(found)
    print(text)
    if name:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
    return int(grows)


def page(found: list[Series]) -> tuple[str, bool]:
    """The table, in Markdown, and whether something grows that must not."""
    version = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout
    lines = [
        "# One process for a long time", "",
        f"`make soak`, {datetime.date.today().isoformat()}, version {version.strip()}, the tests' tiny policy with its probe: "
        + ", ".join(f"{len(series.values['seconds']):,} {series.name}" for series in found)
        + ". Slopes are of all but the first quarter of each, with 95% intervals; seconds are the processor's.", "",
        "| | quantity | mean | slope for one | 95% interval | allowed | |", "| --- | --- | ---: | ---: | --- | ---: | --- |",
    ]  # fmt: skip
    grows = False
    for series in found:
        for name, told in series.slopes().items():
            allowed = ALLOWED.get(name)
            bad = allowed is not None and told.low > allowed
            grows |= bad
            verdict = (
                ""
                if allowed is None
                else "**grows**"
                if bad
                else "flat"
                if told.low <= 0 <= told.high
                else "within what is allowed"
            )
            limit = "" if allowed is None else f"{allowed:g}"
            interval = f"{told.low:.2g} to {told.high:.2g}"
            lines.append(
                f"| {series.name} | {name} | {told.mean:,.4g} | {told.per_item:.2g} | {interval} | {limit} | {verdict} |"
            )
    return "\n".join(lines) + "\n", grows


if __name__ == "__main__":
    sys.exit(main())
