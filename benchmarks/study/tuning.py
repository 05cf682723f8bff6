"""The constant bonus's coefficient: the one of a grid that holds entropy nearest to the target, on a seed that no arm has."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.study.runs import run
from benchmarks.study.summary import distance

GRID, SEED, STEPS = (0.01, 0.02, 0.025, 0.03, 0.05), 100, 300


def tuning_run(task: str, coefficient: float) -> Path:
    """One run of the grid; a file that is there is not made again."""
    return run(task, "bonus", SEED, STEPS, entropy_coef=coefficient)


def tuned(task: str) -> dict[str, float]:
    """The setting, out of the grid's runs; those that are missing are made."""
    found = {}
    for coefficient in GRID:
        found[coefficient] = distance(json.loads(tuning_run(task, coefficient).read_text()))
        print(f"entropy_coef {coefficient:g}: rms distance {found[coefficient]:.4f} nats per token", flush=True)
    return {"entropy_coef": min(found, key=lambda coefficient: found[coefficient])}
