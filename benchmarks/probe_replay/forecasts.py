"""The probe's forecast (rl_training.probe.forecast), held against recorded runs, with persistence and straight lines beside it.

Fed with what a watch of the pool logs. `entropy`: share of steps at which the 80% band of the filtered entropy holds the entropy
of the step's fresh sequences, their own error added. `steps`: over all steps before h falls below a floor, and floors that the
run crosses, the share at which the 80% band of the steps to it holds the number that it took. A run's crossing is where the mean
of five steps' fresh entropies is below the floor.

`error`: median absolute error of the steps to the floor, in steps, of the forecast and of rivals that continue
    persistence      the last measured change
    straight line    the least-squares line through the last LINE logged entropies
A rival that does not reach the floor within HORIZON steps is given that many.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.probe_replay.pooled import Measured, PooledWatch
from benchmarks.probe_replay.tape import Tape
from rl_training.config import EntropyProbeConfig
from rl_training.probe.forecast import EntropyForecast

FLOORS = (0.42, 0.38, 0.34, 0.30, 0.27)
HORIZON, LINE, BEGUN = 1000, 10, 5


def forecast_figures(tapes: list[Tape], watch: PooledWatch) -> dict[str, Any]:
    """Figures of the module's docstring over all runs; those of floors over the runs that cross them."""
    inside: list[bool] = []
    held: list[bool] = []
    errors: dict[str, list[float]] = {"forecast": [], "persistence": [], "straight line": []}
    for tape in tapes:
        measured, levels = watch.measured(tape), tape.levels
        smooth = np.convolve([level.value for level in levels], np.ones(5) / 5, "valid")
        for floor in FLOORS:
            forecast, logged = EntropyForecast(_config(watch, floor)), list[tuple[int, float]]()
            below = np.flatnonzero(smooth < floor)
            crossed = int(below[0]) + 2 if len(below) else None
            for m in measured:
                found = forecast.add(_metrics(m))
                logged.append((m.first, m.entropy.value))
                if floor == FLOORS[0] and found:
                    reach = (found["entropy_filtered_high"] - found["entropy_filtered_low"]) / 2
                    truth = levels[m.last]
                    both = math.hypot(reach, 1.2816 * truth.error)
                    inside.append(abs(found["entropy_filtered"] - truth.value) <= both)
                left = None if crossed is None else crossed - (m.last + 1)
                if left is None or left <= 0 or m.last < BEGUN or not found:
                    continue
                low, high = found.get("steps_to_floor_low", math.inf), found.get("steps_to_floor_high", math.inf)
                held.append(low <= left <= high)
                errors["forecast"].append(abs(found.get("steps_to_floor", HORIZON) - left))
                h, each = m.entropy.value + m.change.value, m.change.value / (m.last - m.first + 1)
                errors["persistence"].append(abs(_reached(h, each, floor) - left))
                steps, values = np.array(logged[-LINE:]).T
                slope, start = np.polyfit(steps, values, 1) if len(steps) > 1 else (0.0, values[0])
                errors["straight line"].append(abs(_reached(slope * (m.last + 1) + start, slope, floor) - left))
    return {
        "entropy": float(np.mean(inside)),
        "steps": float(np.mean(held)) if held else math.nan,
        "cases": len(held),
        "errors": {name: float(np.median(values)) if values else math.nan for name, values in errors.items()},
    }


def _config(watch: PooledWatch, floor: float) -> EntropyProbeConfig:
    return EntropyProbeConfig(rollouts="pool", entropy_floor=floor, measure_every=watch.span, pool_age=8)


def _metrics(m: Measured) -> dict[str, float]:
    steps = m.last - m.first + 1
    return {
        "entropy": m.entropy.value,
        "entropy_se": m.entropy.error,
        "measured": m.change.value / steps,
        "measured_se": m.change.error / steps,
        "measured_over": float(steps),
    }


def _reached(h: float, each: float, floor: float) -> float:
    if h <= floor:
        return 0.0
    return min((floor - h) / each, HORIZON) if each < 0 else HORIZON
