"""How series of predictions agree with the truth, over several runs, with block-bootstrap intervals.

    r          correlation of prediction and truth over all steps of all runs; `ceiling` is what a perfect prediction
               would reach, given the truth's own error:  sqrt(1 - mean se^2 / var(truth))
    partial    their correlation beyond persistence: given the truth of the step before
    slope      of the truth on the prediction: 1 where a predicted -0.01 means -0.01 on average, whatever the truth's noise
    sum        sum of predictions / sum of truths
    coverage   share of steps whose 95% interval holds the truth, the truth's own error added
    windows    the same of sums over 10 steps, errors in quadrature
    error      root mean square difference, the truth's own error taken off

Intervals: 95%, blocks of BLOCK successive steps drawn with replacement from all runs (a run's steps are not independent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.probe_replay.pooled import Measured
from benchmarks.probe_replay.schedules import Series
from benchmarks.probe_replay.tape import Estimated, Tape

BLOCK, DRAWS = 10, 600
NAMES = ("r", "partial", "slope", "sum")


@dataclass(frozen=True)
class Pairs:
    """Predictions beside truths, steps of all runs in one row; a run's first step has none before it and is left out."""

    predicted: np.ndarray
    error: np.ndarray
    reach: np.ndarray
    truth: np.ndarray
    truth_error: np.ndarray
    last: np.ndarray
    run: np.ndarray

    def take(self, rows: np.ndarray) -> Pairs:
        return Pairs(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Truths(Protocol):
    """A run with what each of its steps truly did."""

    @property
    def truth(self) -> list[Estimated]: ...

    def __len__(self) -> int: ...


def pairs_of(tapes: Sequence[Truths], series: Sequence[Series]) -> Pairs:
    """Predictions of each run beside its truths."""
    rows = []
    for number, (tape, predictions) in enumerate(zip(tapes, series, strict=True)):
        for t in range(1, len(tape)):
            p = predictions[t]
            if p is not None:
                truth = tape.truth[t]
                rows.append((p.value, p.error, p.reach, truth.value, truth.error, tape.truth[t - 1].value, number))
    return Pairs(*np.array(rows, dtype=float).T)


def agreement(pairs: Pairs, draws: int = DRAWS, seed: int = 0) -> dict[str, float | tuple[float, float]]:
    """Every quantity of the module's docstring; (low, high) of NAMES under `<name>_interval`."""
    found: dict[str, float | tuple[float, float]] = dict(zip(NAMES, _figures(pairs), strict=True))
    e, both = pairs.predicted - pairs.truth, np.hypot(pairs.error, pairs.truth_error)
    found["coverage"] = float((np.abs(e) <= pairs.reach * both).mean()) if np.isfinite(both).all() else np.nan
    found["windows"] = _windows(pairs)
    found["error"] = float(np.sqrt(max(0.0, np.square(e).mean() - np.square(pairs.truth_error).mean())))
    runs = [_figures(pairs.take(np.flatnonzero(pairs.run == run))) for run in np.unique(pairs.run)]
    found["worst_r"] = float(min(run[0] for run in runs))
    found["worst_partial"] = float(min(run[1] for run in runs))
    rng, blocks = np.random.default_rng(seed), _blocks(pairs.run)
    drawn = [
        _figures(pairs.take(np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])))
        for _ in range(draws)
    ]
    for name, values in zip(NAMES, np.array(drawn).reshape(draws, len(NAMES)).T, strict=True):
        low, high = np.nanpercentile(values, (2.5, 97.5)) if np.isfinite(values).any() else (np.nan, np.nan)
        found[f"{name}_interval"] = (float(low), float(high))
    return found


def ceilings(pairs: Pairs) -> dict[str, float]:
    """What a perfect prediction would reach against this truth."""
    noise, truth = float(np.square(pairs.truth_error).mean()), pairs.truth
    left = truth - np.polyval(np.polyfit(pairs.last, truth, 1), pairs.last)
    return {
        "r": float(np.sqrt(max(0.0, 1 - noise / truth.var()))),
        "partial": float(np.sqrt(max(0.0, 1 - noise / left.var()))),
        "truth_error": noise**0.5,
        "truth_spread": float(truth.std()),
    }


def running_coverage(tapes: list[Tape], measured: list[list[Measured]]) -> float:
    """Share of spans whose running sum's 95% interval holds the change so far, told by fresh samples at its ends."""
    held = []
    for tape, spans in zip(tapes, measured, strict=True):
        start = tape.levels[0]
        for span in spans:
            if span.last + 1 < len(tape):
                end = tape.levels[span.last + 1]
                error = float(np.sqrt(span.total.error**2 + start.error**2 + end.error**2))
                held.append(abs(span.total.value - (end.value - start.value)) <= span.total.reach * error)
    return float(np.mean(held)) if held else float("nan")


def _figures(p: Pairs) -> tuple[float, float, float, float]:
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef([p.predicted, p.truth, p.last])
        partial = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
        slope = float(np.cov(p.predicted, p.truth)[0, 1] / p.predicted.var(ddof=1))
        # Persistence says nothing beyond itself.
        return (
            float(r[0, 1]),
            float(partial) if abs(r[0, 2]) < 1 - 1e-9 else np.nan,
            slope,
            float(p.predicted.sum() / p.truth.sum()),
        )


def _windows(pairs: Pairs) -> float:
    held = []
    for rows in _blocks(pairs.run):
        if len(rows) >= BLOCK - 1:
            gap = abs(pairs.predicted[rows].sum() - pairs.truth[rows].sum())
            error = np.sqrt(np.square(pairs.error[rows]).sum() + np.square(pairs.truth_error[rows]).sum())
            held.append(gap <= pairs.reach[rows].mean() * error)
    return float(np.mean(held)) if held and np.isfinite(pairs.error).all() else np.nan


def _blocks(run: np.ndarray) -> list[np.ndarray]:
    out = []
    for number in np.unique(run):
        rows = np.flatnonzero(run == number)
        out += np.array_split(rows, max(1, round(len(rows) / BLOCK)))
    return out
