"""The level of noisy changes: quieter than they are, not biased where they stay alike, and passed on where nothing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_core.uncertainty import Estimate
from rl_training.probe.local_level import LocalLevel


def followed(truth: np.ndarray, entropies: np.ndarray, error: float, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(measured, filtered) over a run, and at how many steps 1.96 errors of the level hold the truth."""
    rng, level = np.random.default_rng(seed), LocalLevel()
    measured, filtered, held = [], [], 0
    for change, entropy in zip(truth, entropies, strict=True):
        measured.append(change + error * rng.normal())
        found = level.add(Estimate(measured[-1], error, 15.0), float(entropy))
        filtered.append(found.value)
        held += abs(found.value - change) <= 1.96 * found.standard_error
    return np.array(measured), np.array(filtered), held


def test_it_is_quieter_and_covers_on_a_decaying_entropy():
    steps, runs, held = 60, 60, 0
    squares = np.zeros(2)
    for seed in range(runs):
        entropies = 2.0 * 0.97 ** np.arange(steps)
        truth = -0.03 * entropies * (1 + 0.1 * np.sin(np.arange(steps) / 5))
        measured, filtered, inside = followed(truth, entropies, 0.02, seed)
        squares += [np.square(measured - truth)[5:].mean(), np.square(filtered - truth)[5:].mean()]
        held += inside
    assert squares[1] < 0.4 * squares[0]
    assert 0.85 <= held / runs / steps <= 0.99


def test_it_follows_a_turn():
    truth = np.concatenate([np.full(20, -0.05), np.full(20, 0.05)])
    _, filtered, _ = followed(truth, np.ones(40), 0.005, 0)
    assert abs(filtered[22:] - 0.05).max() < 0.03


def test_what_has_no_error_is_passed_on():
    level = LocalLevel()
    level.add(Estimate(-0.1, 0.01, 3.0), 1.0)
    for odd in (Estimate(0.5, math.nan), Estimate(math.nan, 0.1)):
        assert level.add(odd, 1.0) is odd
    assert level.add(Estimate(-0.1, 0.01, 3.0), 1.0).value == pytest.approx(-0.1)
    assert math.isfinite(level.add(Estimate(0.0, 0.0, 3.0), 0.0).value)
