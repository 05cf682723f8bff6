"""The error of a sum over steps that share sampling units, against simulated runs and the plain sum of variances."""

from __future__ import annotations

import math

import pytest
import torch

from entropy_core.running_sum import RunningSum
from entropy_core.uncertainty import jackknife_standard_error


def without_each(values: torch.Tensor) -> torch.Tensor:
    return (values.sum() - values) / (len(values) - 1)


def test_of_steps_that_share_nothing_variances_add() -> None:
    total, wanted = RunningSum(), 0.0
    for step in range(4):
        values = torch.randn(6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found = total.add(float(values.mean()), without_each(values), [f"{step}-{i}" for i in range(6)])
        wanted += jackknife_standard_error(without_each(values)) ** 2
        assert found.standard_error == pytest.approx(wanted**0.5)


def test_what_a_unit_keeps_adds_up_over_its_steps() -> None:
    """A unit's own value stays for three steps, an eighth... a third of the units is new each step."""
    generator, runs, steps = torch.Generator().manual_seed(0), 300, 12
    inside, naive = 0, 0
    for _ in range(runs):
        total, pool, plain, summed = RunningSum(), [], 0.0, 0.0
        for step in range(steps):
            fresh = [(f"{step}-{j}", float(torch.randn((), generator=generator))) for j in range(9 if step == 0 else 3)]
            pool = (pool[3:] if step else pool) + fresh
            values = torch.tensor([v for _, v in pool], dtype=torch.float64)
            found = total.add(float(values.mean()), without_each(values), [name for name, _ in pool])
            plain += jackknife_standard_error(without_each(values)) ** 2
            summed += float(values.mean())
        inside += abs(summed) <= 1.96 * found.standard_error
        naive += abs(summed) <= 1.96 * plain**0.5
    assert 0.9 <= inside / runs <= 0.98
    assert naive / runs < 0.85, "the test is blind to shared units"
    assert 10 < found.degrees_of_freedom < 60


def test_it_goes_on_from_its_state_and_refuses_another() -> None:
    one, two = RunningSum(), RunningSum()
    values = torch.arange(4, dtype=torch.float64)
    one.add(1.0, values, list("abcd"))
    two.load(one.state())
    assert one.add(2.0, values, list("cdef")) == two.add(2.0, values, list("cdef"))
    good = one.state()
    for bad in (
        {},
        {**good, "value": math.nan},
        {**good, "variance": -1.0},
        {**good, "live": {"a": "x"}},
        {**good, "known": 1},
    ):
        with pytest.raises(ValueError, match="running sum"):
            two.load(bad)


def test_a_single_unit_has_no_error() -> None:
    assert math.isnan(RunningSum().add(1.0, torch.zeros(1), ["a"]).standard_error)
    with pytest.raises(ValueError, match="units"):
        RunningSum().add(1.0, torch.zeros(2), ["a"])
