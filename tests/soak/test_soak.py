"""The quick part of `make soak`, and that it tells growth from noise."""

from __future__ import annotations

import numpy as np
import pytest

from tests.soak.__main__ import Series, page
from tests.soak.slopes import slope


def test_growth_is_told_from_noise() -> None:
    generator = np.random.default_rng(0)
    walk = 1000 + generator.normal(size=400)
    walk[:60] -= np.linspace(500, 0, 60)  # caches fill
    flat, grown = slope(list(walk)), slope(list(walk + 0.05 * np.arange(400)))
    assert flat.low < 0 < flat.high and abs(flat.per_item) < 0.01
    assert grown.grows and grown.low < 0.05 < grown.high
    assert slope([7.0] * 40).per_item == 0.0


def test_a_leak_fails_the_soak() -> None:
    def of(slope: float) -> Series:
        series = Series("x")
        series.values = {name: [100.0 + slope * k for k in range(100)] for name in series.values}
        return series

    assert page([of(0.0)])[1] is False and page([of(50.0)])[1] is True
    assert "**grows**" in page([of(50.0)])[0] and "**grows**" not in page([of(0.0)])[0]


@pytest.mark.long
def test_a_little(tmp_path) -> None:
    from tests.soak.__main__ import soak

    found = soak(tmp_path, 12, 3, 3)
    assert [len(series.values["seconds"]) for series in found] == [12, 3, 3]
