"""One run of an arm: trained, measured on the way, and stored as one file of rows; a file that is there is not made again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.study.arms import ARMS, make_trainer
from benchmarks.study.measure import HeldOut, look
from benchmarks.study.tasks import ROOT, TASKS, Task
from rl_training.files import write_whole

STEPS, EVERY, SEEDS = 300, 10, (0, 1, 2, 3, 4)
PROMPTS, LAST_PROMPTS, LAST_EACH = 256, 64, 16


def run(task_name: str, arm_name: str, seed: int, steps: int = STEPS, **overrides: Any) -> Path:
    """Train an arm from the task's small policy and store what it was.

    Args:
        overrides: of `make_trainer`; they become part of the file's name.
    """
    torch.set_num_threads(1)
    task = TASKS[task_name]
    label = "".join(f"-{key}={value}" for key, value in sorted(overrides.items()))
    path = ROOT / "runs" / f"{task_name}-{arm_name}{label}-{seed}.json"
    if path.exists():
        return path
    begun = time.perf_counter()
    trainer = make_trainer(ARMS[arm_name], task, seed, steps, ROOT / "work" / path.stem, **overrides)
    trainer.remove_callback(PrinterCallback)
    watcher = Looks(trainer, task, EVERY, PROMPTS)
    trainer.add_callback(watcher)
    trainer.train()
    last = look(trainer.model, trainer.processing_class, task, LAST_PROMPTS, LAST_EACH, 10_000 + seed)
    stored = {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "steps": steps,
        "target": task.target,
        "overrides": overrides,
        "rows": watcher.rows,
        "last": last,
        "logged": _logged(trainer.state.log_history),
        "seconds": time.perf_counter() - begun,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(stored))
    return path


class Looks(TrainerCallback):
    """Measures the policy every `every` steps on `prompts` held-out prompts, the first time before the first step."""

    def __init__(self, trainer: Any, task: Task | HeldOut, every: int, prompts: int) -> None:
        self._trainer, self._task, self._every, self._prompts = trainer, task, every, prompts
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        seen = look(self._trainer.model, self._trainer.processing_class, self._task, self._prompts, 1, 7 + step)
        self.rows.append({"step": step, **seen})


def _logged(history: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of what the trainer logged at every step."""
    rows = [row for row in history if "loss" in row]
    names = ["entropy", "reward", "grad_norm", "step_time", "entropy_coef"]
    names += sorted({key for row in rows for key in row if key.startswith(("entropy_controller/", "left_out/"))})
    return {name: [_rounded(row.get(name)) for row in rows] for name in names if any(name in row for row in rows)}


def _rounded(value: Any) -> float | None:
    return None if value is None else float(f"{float(value):.6g}")
