"""Standard errors with prompts as units, and the product of two means without its diagonal."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from entropy_core.uncertainty import (
    effective_degrees_of_freedom,
    jackknife_over_prompts,
    jackknife_standard_error,
    sums_over_prompts,
    u_statistic,
)
from tests.oracle.comparison import assert_close, relative_error


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_a_mean_it_is_the_classical_standard_error() -> None:
    values = 3 + 2 * draws(40)
    deviation = float(values.std())
    assert_close(
        jackknife_over_prompts(values, torch.arange(40)),
        deviation / math.sqrt(40),
        1e-10,
        "one completion a prompt: s/√n",
        {
            "the standard deviation of a summand": deviation,
            "the standard error of a sum": deviation * math.sqrt(40),
            "divided by n, not √n": deviation / 40,
            "without Bessel's correction": float(values.std(unbiased=False)) / math.sqrt(40),
        },
    )


def test_completions_of_one_prompt_are_not_independent() -> None:
    """Ten copies of every sequence are no new prompts: the standard error stays."""
    values = draws(12)
    alone = jackknife_over_prompts(values, torch.arange(12))
    copies = jackknife_over_prompts(values.repeat(10), torch.arange(12).repeat(10))
    independent = jackknife_over_prompts(values.repeat(10), torch.arange(120))
    assert_close(copies, alone, 1e-12, "sequences are units", {"copies count as independent": independent})


def test_of_a_ratio_against_leaving_out_by_hand() -> None:
    index = torch.tensor([3, 3, 0, 8, 8, 8, 5, 0])
    above, below = (
        2 + draws(8, 1),
        torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 1.0, 2.0, 2.0], dtype=torch.float64),
    )
    ratios = []
    for prompt in (0, 3, 5, 8):
        rest = index != prompt
        ratios.append(float(above[rest].sum() / below[rest].sum()))
    mean = sum(ratios) / 4
    wanted = math.sqrt(3 / 4 * sum((ratio - mean) ** 2 for ratio in ratios))
    per_sequence = float((above / below).std() / math.sqrt(8))
    assert_close(
        jackknife_over_prompts(above, index, below),
        wanted,
        1e-12,
        "jackknife of a ratio of sums over prompts",
        {"standard error of the mean of ratios": per_sequence},
    )


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 400 estimates of a ratio of means, about 68% lie within one standard error (binomial σ is 2.3%)."""
    generator = torch.Generator().manual_seed(9)
    inside = 0
    for _ in range(400):
        lengths = torch.randint(1, 9, (32,), generator=generator).double()
        entropies = lengths * (0.5 + torch.rand(32, generator=generator, dtype=torch.float64))
        error = jackknife_over_prompts(entropies, torch.arange(32), lengths)
        inside += abs(float(entropies.sum() / lengths.sum()) - 1.0) <= error
    assert 0.58 <= inside / 400 <= 0.76, f"{inside / 4:.0f}% within one standard error: a factor is missing"


def test_one_heavy_fold_leaves_few_degrees_of_freedom() -> None:
    even = torch.tensor([1.0, -1.0, 1.2, -1.2, 0.9, -0.9])
    heavy = torch.tensor([5.0, -1.0, -1.2, -0.8, -1.1, -0.9])
    assert effective_degrees_of_freedom(even) == 5
    wanted = 1 / (1 / 5 + stats.kurtosis(heavy.numpy(), bias=False) / 12)
    assert effective_degrees_of_freedom(heavy) == pytest.approx(wanted) and wanted < 2.5
    assert effective_degrees_of_freedom(torch.tensor([1.0, -1.0])) == 1
    assert effective_degrees_of_freedom(torch.zeros(5)) == 4 and effective_degrees_of_freedom(torch.zeros(1)) == 1


def test_one_prompt_says_nothing_about_its_spread() -> None:
    assert math.isnan(jackknife_over_prompts(draws(4), torch.zeros(4, dtype=torch.long)))
    assert math.isnan(jackknife_standard_error(torch.ones(1)))


def test_sums_over_prompts_in_ascending_order() -> None:
    sums = sums_over_prompts(torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), torch.tensor([9, 2, 9]))
    assert sums.tolist() == [[2.0, 20.0], [5.0, 50.0]] and sums.dtype == torch.float64


@pytest.mark.parametrize("count", [2, 3])
def test_the_u_statistic_is_unbiased(count: int) -> None:
    """Averaged over every draw of B prompts from a small law of correlated (X, Y): exactly E[X]·E[Y]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(5, 2, generator=generator, dtype=torch.float64)
    wanted = float(x.mean(0) @ y.mean(0))
    estimates, plain = [], []
    for draw in itertools.product(range(5), repeat=count):
        xs, ys = x[list(draw)], y[list(draw)]
        estimates.append(u_statistic(xs, ys))
        plain.append(float(xs.mean(0) @ ys.mean(0)))
    biased = sum(plain) / len(plain)
    assert_close(
        sum(estimates) / len(estimates),
        wanted,
        1e-10,
        "the U-statistic",
        {"the diagonal t = t′ is kept": biased},
    )


def test_the_u_statistic_is_the_formula_of_the_theory() -> None:
    x, y = draws(24).reshape(6, 4), draws(24, 1).reshape(6, 4)
    formula = 6 / 5 * float(x.mean(0) @ y.mean(0)) - float((x * y).sum()) / (6 * 5)
    assert relative_error(u_statistic(x.float(), y.float()), formula) < 1e-5
    assert_close(u_statistic(x, y), formula, 1e-12, "B/(B−1) X̄·Ȳ − Σ X_n·Y_n / (B(B−1))")


def test_the_u_statistic_needs_two_prompts_and_equal_shapes() -> None:
    with pytest.raises(ValueError):
        u_statistic(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError):
        u_statistic(torch.ones(2, 3), torch.ones(3, 3))
