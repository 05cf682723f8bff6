"""The quick part of `make calibrate`: errors, intervals and the rule of agreement in a world whose truth is known."""

from __future__ import annotations

import pytest
from scipy import stats

from benchmarks.calibration import SHAPES, World, simulate

BUFFERS = 300


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("name", ["64 prompts x 1", "16 prompts x 1 to 7", "4 prompts x 1"])
def test_intervals_cover_and_the_rule_rejects_at_its_level(world: World, name: str) -> None:
    """Bounds are what 300 buffers of a rate inside the stated range give in all but 1 of 1000 repetitions. The lower end for
    coverage is that of the range which the whole table (benchmarks/results/calibration) shows to be reached, not 93%."""
    rates = simulate(world, next(shape for shape in SHAPES if shape.name == name), BUFFERS, seed=1)
    lowest = {"64 prompts x 1": 0.90, "16 prompts x 1 to 7": 0.88, "4 prompts x 1": 0.80}[name]
    for quantity in ("entropy", "predicted", "measured", "4 folds"):
        least = stats.binom.ppf(0.001, BUFFERS, lowest) / BUFFERS
        assert rates[f"coverage of {quantity}"] >= least, f"{quantity}: {rates[f'coverage of {quantity}']:.1%}"
    level = rates["level of the agreement rule"]
    assert 0.005 <= level <= stats.binom.ppf(0.999, BUFFERS, 0.07) / BUFFERS, (
        f"{level:.1%}: below, predictions are held at the whole batch's entropy without a prompt; above, an error is too small"
    )
    assert rates["level in quadrature, as before"] <= 0.01, "quadrature never rejects: this is what the rule replaced"
    if name == "64 prompts x 1":
        assert rates["power at a gap of 15% of the agreement rule"] >= 0.5
