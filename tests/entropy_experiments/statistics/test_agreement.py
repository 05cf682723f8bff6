"""The rule that decides whether a prediction and a measurement agree: its error, its level, and what it is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from entropy_core.gradients import dot, entropy_gradient
from entropy_experiments.fisher_analyzer import analyze_batches
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.statistics.agreement import (
    compare,
    paired_agreement,
    told_from_zero,
    unpaired_agreement,
)
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.step.settings import AnalysisSettings
from rl_training.intervals import t_quantile
from tests.entropy_core.support import right_padded
from tests.oracle.comparison import assert_close
from tests.oracle.model_cases import CASES, VOCABULARY, random_sequences


def test_quantiles_are_students():
    assert [round(t_quantile(n), 2) for n in (1, 3, 15)] == [12.71, 3.18, 2.13]
    assert t_quantile(math.inf) == pytest.approx(1.959964, abs=1e-4)
    assert (
        told_from_zero(1.0, 0.4, 3) is False and told_from_zero(1.0, 0.4) is True and told_from_zero(1.0, None) is None
    )


def test_the_paired_error_is_the_jackknife_of_the_difference_and_the_p_value_students():
    values = np.random.default_rng(0).normal(size=9)
    mean = (values.sum() - values) / 8
    found = paired_agreement(float(values.mean()), mean)
    classical = stats.ttest_1samp(values, 0.0)
    assert found is not None and found.paired and found.degrees_of_freedom == 8
    assert found.p_value == pytest.approx(classical.pvalue) and found.z == pytest.approx(abs(classical.statistic))
    assert (found.low, found.high) == pytest.approx(tuple(classical.confidence_interval(0.95)))
    assert found.agrees == (classical.pvalue > 0.05)
    nothing = ([0.1], [0.1, math.nan], [0.3, 0.3])
    assert [paired_agreement(0.2, series) for series in nothing] == [None, None, None]


def test_sides_without_shared_tokens_add_in_quadrature_with_welchs_degrees_of_freedom():
    left, right = np.random.default_rng(1).normal(size=7), 3 * np.random.default_rng(2).normal(size=5)
    sides = [(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))) for x in (left, right)]
    found = unpaired_agreement(*sides, (7, 5))
    classical = stats.ttest_ind(left, right, equal_var=False)
    assert found is not None and not found.paired
    assert found.degrees_of_freedom == pytest.approx(classical.df) and found.p_value == pytest.approx(classical.pvalue)
    assert unpaired_agreement((1.0, None), (0.0, 0.4)) is None and unpaired_agreement((1.0, 0.0), (0.0, 0.0)) is None


def test_without_every_prompt_on_both_sides_nothing_is_decided():
    known = {"value": 1.0, "left_out": [0.9, 1.0, 1.1]}
    assert compare(known, {"value": 0.5}) is None and compare(None, known) is None
    assert compare(known, {"value": 0.5, "left_out": [0.4, 0.6]}) is None, "other prompts"
    assert compare(known, {"change": 0.5, "left_out": [0.4, 0.5, 0.7]}) is not None


def test_it_rejects_at_its_level_where_quadrature_cannot_reject():
    """64 prompts; both sides share nearly all of their noise (correlation 0.95), as on the same tokens."""
    generator, wrong, quadrature, power = np.random.default_rng(3), 0, 0, 0
    for _ in range(600):
        shared, own = generator.normal(size=64), generator.normal(size=(2, 64))
        sides = 0.3 * (math.sqrt(0.95) * shared + math.sqrt(0.05) * own) - 0.2
        left_out = (sides.sum(1, keepdims=True) - sides) / 63
        means, errors = sides.mean(1), sides.std(axis=1, ddof=1) / 8
        found = compare({"value": means[0], "left_out": left_out[0]}, {"value": means[1], "left_out": left_out[1]})
        large = compare({"value": 1.15 * means[0], "left_out": 1.15 * left_out[0]},
                        {"value": means[1], "left_out": left_out[1]})  # fmt: skip
        wrong, power = wrong + (not found.agrees), power + (not large.agrees)
        quadrature += abs(means[0] - means[1]) > 2 * math.hypot(*errors)
    low, high = stats.binom.ppf((0.001, 0.999), 600, 0.05)
    assert low <= wrong <= high and quadrature == 0 and power > 300, (wrong, quadrature, power)


def some_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("modules", [None, ["*q_proj*"]], ids=["rows", "derivatives"])
def test_values_without_a_prompt_are_the_estimates_of_the_other_prompts_alone(modules):
    """Entropy, length and baselines of the others too: held at those of the whole batch, a prediction's error misses what it
    shares with the measurement, and the difference of both seems up to several times less certain than it is."""
    model = CASES[0].make()
    lists = random_sequences(VOCABULARY)
    batch, weights = right_padded(lists), torch.linspace(-1, 1.5, 7, dtype=torch.float64) / 7
    options = KernelOptions() if modules is None else KernelOptions(modules=modules)
    found = analyze_batches(
        model,
        some_optimizer(model),
        batch,
        batch,
        weights,
        AnalysisSettings(kernel=options, measure=False, compute_full=False),
    )
    taken, predictions = found.training.known_step.parameter_delta, found.numbers.step.predictions
    for per_token, numbers in ((True, predictions.per_token), (False, predictions.per_completion)):
        for estimator, parts in numbers.items():
            estimate = parts["total"]
            if estimate.left_out is None:
                assert estimator == "score_function", "its baselines are other prompts where each has one completion"
                continue
            for place, prompt in enumerate(batch.prompt_index.unique().tolist()):
                rest = batch.select([n for n, p in enumerate(lists.prompt_index) if p != prompt])
                wanted = dot(entropy_gradient(model, rest, estimator, per_token), taken)
                held = float(estimate.value)
                assert_close(
                    estimate.left_out[place], wanted, 1e-5, f"{estimator}, per_token={per_token}, without {prompt}",
                    {"the whole": held},
                )  # fmt: skip


def test_correlations_have_fishers_interval_and_small_ones_none():
    x = np.array([0.0, 1, 2, 3, 4, 5])
    noise = np.array([1.0, -1, 1, 1, -1, -1])
    wave = (noise - noise.mean()) - (x - x.mean()) * ((noise @ (x - x.mean())) / ((x - x.mean()) @ (x - x.mean())))
    r = 0.44
    y = r * (x - x.mean()) / np.linalg.norm(x - x.mean()) + math.sqrt(1 - r * r) * wave / np.linalg.norm(wave)
    found = correlation(x, y)
    assert (found.value, round(found.low, 2), round(found.high, 2)) == (pytest.approx(0.44), -0.58, 0.92)
    assert str(found) == "0.44, 95% interval −0.58 to 0.92"
    assert correlation(x[:3], y[:3]) is None and correlation(x, np.ones(6)) is None
    inside, generator = 0, np.random.default_rng(0)
    for _ in range(400):
        z = generator.normal(size=(2, 12))
        interval = correlation(z[0], 0.6 * z[0] + 0.8 * z[1])
        inside += interval.low <= 0.6 <= interval.high
    assert 0.91 <= inside / 400 <= 0.98


def test_intervals_of_correlations_hold_for_heavy_tails_and_are_a_jackknife_over_pairs():
    """Of t with 3 degrees of freedom, where Fisher's covers 73%."""
    generator = np.random.default_rng(1)
    inside = fishers = 0
    for _ in range(400):
        z = generator.standard_t(3, size=(2, 100))
        found = correlation(z[0], 0.6 * z[0] + 0.8 * z[1])
        inside += found.low <= 0.6 <= found.high
        fishers += abs(math.atanh(found.value) - math.atanh(0.6)) <= 1.96 / math.sqrt(97)
    assert inside / 400 >= 0.88 > 0.82 > fishers / 400, (inside / 400, fishers / 400)
    x, y = generator.normal(size=(2, 9))
    others = [math.atanh(np.corrcoef(np.delete(x, p), np.delete(y, p))[0, 1]) for p in range(9)]
    error = math.sqrt(8 / 9 * np.square(others - np.mean(others)).sum())
    centre = math.atanh(np.corrcoef(x, y)[0, 1])
    wanted = [math.tanh(centre + sign * stats.t.ppf(0.975, 8) * error) for sign in (-1, 1)]
    assert [correlation(x, y).low, correlation(x, y).high] == pytest.approx(wanted)
