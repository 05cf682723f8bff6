"""Which part of a change is named the largest: by the paired difference in size, whatever the signs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from entropy_experiments.statistics.largest_part import largest_part


def part(draws: np.ndarray) -> tuple[float, np.ndarray]:
    return float(draws.mean()), (draws.sum() - draws) / (len(draws) - 1)


def two_parts(rng: np.random.Generator, second: float) -> dict[str, tuple[float, np.ndarray]]:
    """Sizes 1 and `second`, of opposite sign, which share most of their noise."""
    shared = rng.gamma(1.0, size=16) - 1
    sizes = {"momentum": -1.0, "batch": second, "weight_decay": 0.01}
    return {name: part(size * (1 + shared) + 0.3 * rng.normal(size=16)) for name, size in sizes.items()}


def test_it_is_decided_by_the_paired_difference_where_the_parts_own_intervals_overlap() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=20)
    parts = {"momentum": part(-1.5 - shared), "batch": part(1.0 + shared + 0.1 * rng.normal(size=20))}
    ends = [stats.t.interval(0.95, 19, loc=value, scale=stats.sem(left_out) * 19) for value, left_out in parts.values()]
    assert -ends[0][1] < ends[1][1], "their own intervals overlap in size"
    found = largest_part(parts)
    assert found is not None and found.certain and (found.part, found.beside) == ("momentum", "batch")
    assert found.difference == pytest.approx(abs(parts["momentum"][0]) - abs(parts["batch"][0]))
    assert found.low > 0 and found.as_dict()["certain"] is True


def test_a_part_whose_sign_is_unknown_counts_with_either_sign() -> None:
    """x = 1.00 +- 0.4, y = -0.05 +- 0.4 that moves with x: x + y is far from 0, x - y is not."""
    draws = np.linspace(-1.6, 1.6, 12)
    parts = {"batch": part(1.0 + draws), "momentum": part(-0.05 - 1.4 * draws)}
    found = largest_part(parts)
    assert found is not None and not found.certain
    assert found.difference == pytest.approx(1.05), "1.00 - (-0.05): the sign that leaves the lower end lower"


def test_its_level_and_power() -> None:
    repeats, rng = 500, np.random.default_rng(1)
    certain = {size: 0 for size in (1.0, 2.0)}
    for _ in range(repeats):
        for size in certain:
            found = largest_part(two_parts(rng, size))
            certain[size] += found is not None and found.certain
    assert certain[1.0] <= stats.binom.ppf(0.999, repeats, 0.05)
    assert certain[2.0] >= 0.8 * repeats


def test_nothing_is_decided_of_a_single_part_or_without_spread() -> None:
    assert largest_part({"batch": part(np.arange(5.0))}) is None
    nothing = {"batch": part(np.arange(1.0, 6.0)), "weight_decay": (0.0, np.zeros(5))}
    assert largest_part(nothing) is None, "a part that is exactly 0 is no rival"
    assert largest_part({"batch": (1.0, np.array([1.0])), "momentum": (0.5, np.array([0.5]))}) is None
