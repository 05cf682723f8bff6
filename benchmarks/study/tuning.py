"""The constant bonus's coefficient: the one of a grid that holds entropy nearest to the target, on a seed that no arm has."""

from __future__ import annotations

import json

from benchmarks.study.runs import run
from benchmarks.study.summary import distance

GRID, SEED, STEPS = (0.01, 0.02, 0.025, 0.03, 0.05), 100, 300


def tune(task: str) -> float:
    """Run what is missing of the grid, and say which coefficient is nearest."""
    found = {}
    for coefficient in GRID:
        stored = json.loads(run(task, "bonus", SEED, STEPS, entropy_coef=coefficient).read_text())
        found[coefficient] = distance(stored)
        print(f"entropy_coef {coefficient:g}: rms distance {found[coefficient]:.4f} nats per token", flush=True)
    return min(found, key=lambda coefficient: found[coefficient])


def tuned(task: str) -> dict[str, float]:
    """The setting, out of the grid's stored runs."""
    return {"entropy_coef": tune(task)}
