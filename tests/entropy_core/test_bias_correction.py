"""The running correction of a quiet, biased estimate, against plain sums over steps and against simulated runs."""

from __future__ import annotations

import math

import pytest
import torch

from entropy_core.bias_correction import BiasCorrection, PairedEstimates
from rl_training.intervals import t_quantile


def pairs_of(seed: int, steps: int, known: list[bool] | None = None) -> list[PairedEstimates]:
    r = torch.rand(steps, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    known = known or [True] * steps
    return [
        PairedEstimates(a, b if k else math.nan, 1 + c, 1 + d if k else math.nan, 0.5 * e if k else math.nan, 15.0)
        for (a, b, c, d, e), k in zip(r, known, strict=True)
    ]


@pytest.mark.parametrize("known", [[True] * 6, [False, True, True, False, True, True]], ids=["all", "some"])
@pytest.mark.parametrize("keep", [0.0, 0.7, 1.0])
def test_values_and_variances_are_those_of_the_weights(keep: float, known: list[bool]) -> None:
    pairs, correction, total = pairs_of(1, 6, known), BiasCorrection(keep), 0.0
    in_sum = [0.0] * 6
    for s in range(6):
        found = correction.add(pairs[s])
        weights = [(keep ** (s - u) if s > u else 1.0) * known[u] for u in range(s + 1)]
        if sum(weights) == 0:
            assert found.value == pairs[s].quiet
            total += found.value
            continue
        weights = [w / sum(weights) for w in weights]
        value = pairs[s].quiet + sum(w * pairs[u].difference for u, w in enumerate(weights) if w)
        total += value
        in_sum = [c + (weights[u] if u <= s else 0.0) for u, c in enumerate(in_sum)]
        assert found.value == pytest.approx(value)
        tau2 = correction._variance_of_bias()
        variance = pairs[s].quiet_variance + tau2 * sum((w - (u == s)) ** 2 for u, w in enumerate(weights))
        variance += sum(w**2 * pairs[u].difference_variance for u, w in enumerate(weights) if w)
        variance += 2 * weights[s] * pairs[s].covariance if weights[s] else 0.0
        assert found.standard_error == pytest.approx(variance**0.5)
        summed = tau2 * sum((c - 1) ** 2 for c in in_sum[: s + 1])
        for c, p in zip(in_sum, pairs[: s + 1], strict=False):
            summed += p.quiet_variance + (2 * c * p.covariance + c**2 * p.difference_variance if c else 0.0)
        assert correction.total().value == pytest.approx(total)
        assert correction.total().standard_error == pytest.approx(summed**0.5)


def test_intervals_cover_where_the_bias_drifts() -> None:
    """Bias 0.02 that wanders by 0.01; errors as of 16 sequences: 95% intervals of the last change and of the sum."""
    generator = torch.Generator().manual_seed(4)
    runs, steps, inside, inside_sum = 400, 20, 0, 0
    normal = torch.randn(runs, steps, 3, generator=generator, dtype=torch.float64).tolist()
    for run in normal:
        correction, truth_sum = BiasCorrection(0.9), 0.0
        for a, b, c in run:
            truth, bias = -0.2, 0.02 + 0.01 * c
            quiet = truth + bias + 0.03 * a
            reference = truth + 0.03 * a + 0.05 * b
            truth_sum += truth
            last = correction.add(PairedEstimates(quiet, reference - quiet, 0.03**2, 0.05**2, 0.0, 15.0))
        inside += abs(last.value - truth) <= t_quantile(last.degrees_of_freedom) * last.standard_error
        whole = correction.total()
        inside_sum += abs(whole.value - truth_sum) <= t_quantile(whole.degrees_of_freedom) * whole.standard_error
    assert 0.92 <= inside / runs <= 0.985 and 0.92 <= inside_sum / runs <= 0.985


def test_variances_come_from_left_out_values() -> None:
    generator = torch.Generator().manual_seed(0)
    quiet, reference = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    found = PairedEstimates.from_left_out(0.5, quiet, 0.7, reference)
    other = reference - quiet
    assert found.difference == pytest.approx(0.2) and found.freedom == 7
    assert found.quiet_variance == pytest.approx(7 / 8 * float((quiet - quiet.mean()).square().sum()))
    assert found.difference_variance == pytest.approx(7 / 8 * float((other - other.mean()).square().sum()))
    assert found.covariance == pytest.approx(7 / 8 * float(((quiet - quiet.mean()) * (other - other.mean())).sum()))


def test_one_prompt_says_nothing_of_an_error() -> None:
    one = torch.zeros(1, dtype=torch.float64)
    found = BiasCorrection(0.9).add(PairedEstimates.from_left_out(0.5, one, 0.7, one))
    assert found.value == pytest.approx(0.7) and math.isnan(found.standard_error)
