"""Do the errors, intervals and p-values that commands print mean what they say? Simulated in an exact world.

    python -m benchmarks.calibration [buffers]          default 2000; results: benchmarks/results/calibration/
    python -m benchmarks.calibration tests              p-values and other intervals alone, five minutes

In the world (calibration_world.py) every completion of a policy is enumerated in float64, so that the truth is known; buffers are
drawn as a trainer draws them, and the product's own functions make intervals, rules and p-values from them. Twelve minutes on one
core; the training side's own noise (calibration_training.py) is the last part. For each shape of a buffer:

    coverage    how often a 95% interval holds the truth (93 to 97%; below 8 prompts 90 to 98%)
    level       how often a rule or test rejects what is right, at 5% (3 to 7%)
    power       how often "they do not agree" is said of a prediction 15% too large
    carries     how often a buffer holds none of the completions (or prompts) that carry half of the variance of a prediction,
                and how often the interval holds the truth with and without: what no interval made of the buffer can know
    said        how often reports say that few prompts carry an error, and how often intervals hold the truth where they do not

"as before": the rule that was replaced, on the same buffers. The other worlds were not looked at when rules were chosen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import calibration_training
from benchmarks.calibration_analyses import ANALYSES
from benchmarks.calibration_checks import (
    Hits,
    agreement_checks,
    checkpoint_checks,
    fold_checks,
    interval_checks,
    running_average_checks,
    tail_checks,
)
from benchmarks.calibration_page import write_page
from benchmarks.calibration_shares import share_intervals
from benchmarks.calibration_tests import TESTS
from benchmarks.calibration_world import Shape, World

__all__ = ["SHAPES", "WORLDS", "Shape", "World", "simulate"]

RESULTS = Path("benchmarks/results/calibration")

SHAPES = (
    Shape("4 prompts x 1", 4, (1, 1), 0.05),
    Shape("8 prompts x 8", 8, (8, 8), 0.05),
    Shape("16 prompts x 1", 16, (1, 1), 0.05),
    Shape("16 prompts x 1 to 7", 16, (1, 7), 0.05),
    Shape("16 prompts x 4, half duplicates", 16, (2, 2), 0.05, copies=2),
    Shape("64 prompts x 1", 64, (1, 1), 0.05),
    Shape("64 prompts x 1, long step", 64, (1, 1), 1.0),
)

LARGE = Shape("64 prompts x 64", 64, (64, 64), 0.05)
"""In which the rule of agreement alone is looked at, in a fifth of the buffers."""

WORLDS = {
    "another policy, 5 tokens": dict(seed=1, policy_seed=11, vocabulary=5, longest=3),
    "a sharper policy, 5 tokens": dict(seed=2, policy_seed=21, vocabulary=5, longest=3, sharpness=1.6),
    "late: rare completions carry the influence": dict(seed=3, policy_seed=5, vocabulary=3, longest=6, sharpness=1.8),
}
"""Skewness and excess kurtosis of a sequence's influence: 1.5 and 4, -0.6 and 0.5, 5.7 and 43; in the first world 1.8 and 6.5."""


def simulate(world: World, shape: Shape, buffers: int, seed: int = 0) -> dict[str, float]:
    """Name of a check -> its rate over `buffers` simulated buffers."""
    rng = np.random.default_rng((seed, shape.prompts, shape.completions[1]))
    found: dict[str, np.ndarray] = {}
    for checks in checks_of(shape):
        found |= checks(world, shape, buffers, rng)
    return {name: float(np.mean(hits)) for name, hits in found.items() if len(hits)}


def checks_of(shape: Shape) -> tuple[Callable[[World, Shape, int, np.random.Generator], Hits], ...]:
    if shape == LARGE:
        return (agreement_checks,)
    return (interval_checks, agreement_checks, fold_checks, checkpoint_checks, running_average_checks, tail_checks)


def main(buffers: int = 2000) -> None:
    world = World()
    tables: dict[str, dict[str, dict[str, float]]] = {"": {}}
    for shape in (*SHAPES, LARGE):
        tables[""][shape.name] = simulate(world, shape, buffers // 5 if shape == LARGE else buffers)
        print(shape.name, {name: round(rate, 3) for name, rate in tables[""][shape.name].items()}, flush=True)
    for name, settings in WORLDS.items():
        other = World(**settings)
        tables[name] = {shape.name: simulate(other, shape, buffers) for shape in SHAPES}
        tables[name][LARGE.name] = simulate(other, LARGE, buffers // 5)
        print(name, "done", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    rates = {"buffers": buffers, "worlds": tables, "tests": simulated_tests(buffers)}
    (RESULTS / "rates.json").write_text(json.dumps(rates, indent=1) + "\n")
    write_page(RESULTS, rates)
    calibration_training.main(max(40, buffers // 2))


def simulated_tests(buffers: int) -> dict[str, dict[str, float]]:
    """Name of a test or interval beside the buffers' own -> shape -> rate."""
    found: dict[str, dict[str, float]] = {}
    for test in (*TESTS, *ANALYSES, share_intervals):
        found |= test(min(buffers, 400))
        print({name: rates for name, rates in list(found.items())[-3:]}, flush=True)
    return found


def tests_anew() -> None:
    """`simulated_tests` again, with the rates of buffers as they are stored."""
    rates = json.loads((RESULTS / "rates.json").read_text())
    rates["tests"] = simulated_tests(rates["buffers"])
    (RESULTS / "rates.json").write_text(json.dumps(rates, indent=1) + "\n")
    write_page(RESULTS, rates)


if __name__ == "__main__":
    tests_anew() if sys.argv[1:] == ["tests"] else main(*map(int, sys.argv[1:2]))
