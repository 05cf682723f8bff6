"""Numbers of a stored run, and of runs side by side.

    distance   sqrt( mean over looks from step 50 on of (h - target)^2 ), nats per token; a look's own error is in it
    reward     mean of the last five looks and of the last measurement, each on fresh completions of held-out prompts

Arms are compared seed by seed: Student's t on the differences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

FROM = 50
LAST_LOOKS = 5


def distance(stored: dict[str, Any]) -> float:
    """Root mean square distance from the target."""
    off = [row["entropy"] - stored["target"] for row in stored["rows"] if row["step"] >= FROM]
    return math.sqrt(float(np.mean(np.square(off))))


def noise(stored: dict[str, Any]) -> float:
    """What a run that is exactly at the target would have for a distance."""
    return math.sqrt(float(np.mean([row["entropy_se"] ** 2 for row in stored["rows"] if row["step"] >= FROM])))


def final_reward(stored: dict[str, Any]) -> float:
    """Mean reward at the end."""
    return float(np.mean([row["reward"] for row in stored["rows"][-LAST_LOOKS:]] + [stored["last"]["reward"]]))


def numbers(stored: dict[str, Any]) -> dict[str, float]:
    """By name, of the table."""
    return {
        "distance": distance(stored),
        "entropy": stored["last"]["entropy"],
        "reward": final_reward(stored),
        "pass_at_4": stored["last"]["pass_at_4"],
        "pass_at_16": stored["last"]["pass_at_16"],
        "distinct": stored["last"]["distinct"],
    }


def by_arm(runs: Iterable[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """Arm -> seed -> numbers."""
    out: dict[str, dict[int, dict[str, float]]] = {}
    for stored in runs:
        out.setdefault(stored["arm"], {})[stored["seed"]] = numbers(stored)
    return out


def paired(ours: dict[int, dict[str, float]], other: dict[int, dict[str, float]], name: str) -> dict[str, float]:
    """Mean difference ours - other over common seeds, its 95% interval and p-value; NaN below two seeds."""
    seeds = sorted(ours.keys() & other.keys())
    values = np.array([ours[s][name] - other[s][name] for s in seeds])
    if len(values) < 2:
        return {"seeds": len(values), "mean": float(values.mean()) if len(values) else math.nan} | dict.fromkeys(
            ("low", "high", "p"), math.nan
        )
    test = ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    return {
        "seeds": len(values),
        "mean": float(values.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "p": float(test.pvalue),
    }


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of results/study/runs.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
