"""The second order against exact Hessians of enumerated policies, and its errors against known spreads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from entropy_core.directional import weights_moved
from entropy_core.gradients import dot, entropy_gradient
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import token_statistics
from entropy_experiments.analyses.higher_order import DEFAULT_SCALES, measure_orders
from entropy_experiments.records.record import json_of
from entropy_experiments.report.figures.higher_order import plot_higher_order
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.findings import higher_order_finding
from entropy_experiments.step.real_steps import measure_curve
from tests.entropy_core.support import distribution_as_batch
from tests.entropy_experiments.analyses.tiny_step import make_step
from tests.oracle.enumeration import (
    CompletionSpace,
    detached_parameters,
    entropies_along,
    enumerate_completions,
    exact_entropies,
    solve,
)
from tests.oracle.policy import DYADIC_TASK, RECURRENT_TASK, DyadicPolicy, RecurrentPolicy

SCALES = np.array(DEFAULT_SCALES)


def random_direction(model: nn.Module, size: float, seed: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}
    norm = math.sqrt(sum(float(d.square().sum()) for d in direction.values()))
    return {name: size / norm * d for name, d in direction.items()}


def exact_orders(model: nn.Module, space: CompletionSpace, direction: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(D, Q) = (d.grad h, 1/2 d.Hess(h).d) of the enumerated h, by two backward passes in float64."""
    parameters = {name: p.requires_grad_(True) for name, p in detached_parameters(model).items()}
    h = exact_entropies(model, space, 1.0, parameters)[1]
    first = torch.autograd.grad(h, list(parameters.values()), create_graph=True)
    slope = sum((g * direction[name]).sum() for name, g in zip(parameters, first, strict=True))
    assert isinstance(slope, torch.Tensor)
    second = torch.autograd.grad(slope, list(parameters.values()))
    return float(slope.detach()), 0.5 * float(
        sum((g * direction[n]).sum() for n, g in zip(parameters, second, strict=True))
    )


@pytest.mark.parametrize("size", [0.1, 0.5])
def test_second_order_of_an_enumerated_policy(size):
    policy, space = RecurrentPolicy(), enumerate_completions(RECURRENT_TASK)
    direction = random_direction(policy, size)
    first, second = exact_orders(policy, space, direction)
    start = entropies_along(policy, space, direction, 0.0)[1]
    changes = np.array([entropies_along(policy, space, direction, s)[1] - start for s in SCALES])
    found = measure_orders(SCALES, changes)
    assert found.first_order.value == pytest.approx(first, rel=1e-3)
    assert found.second_order.value == pytest.approx(second, rel=1e-2), "half, sign or power of the second order"
    error, said = abs(found.second_order.value - second), found.second_order.fit_error
    assert error <= 1.1 * said, "the orders left out cost more than the fit admits"
    assert said < 0.01 * abs(second)
    assert found.equal_at.value == pytest.approx(abs(first / second), rel=1e-2)
    assert found.ratio == pytest.approx(second / first, rel=1e-2)
    given = measure_orders(SCALES, changes, slope={"value": first, "standard_error": 0.0})
    assert given.first_order.value == first and given.first_order.source == "split estimator"
    assert given.first_order.fitted == pytest.approx(first, rel=1e-3)


def test_measured_curve_of_a_batch_that_is_the_distribution():
    """Reweighting it is exact, so the whole path from forward passes to Q meets autograd's Hessian."""
    policy = DyadicPolicy()
    exact = solve(policy, enumerate_completions(DYADIC_TASK))
    batch = distribution_as_batch(exact, 512)
    direction = random_direction(policy, 0.5, seed=2)
    before = token_statistics(policy, batch)
    weights = [p.detach().clone() for p in policy.parameters()]
    curve = measure_curve(policy, direction, DEFAULT_SCALES, batch, before)
    assert all(torch.equal(p, w) for p, w in zip(policy.parameters(), weights, strict=True))
    start = exact.token_entropy
    for s, change in zip(DEFAULT_SCALES, curve.changes.tolist(), strict=True):
        assert change == pytest.approx(entropies_along(policy, exact.space, direction, s)[1] - start, abs=1e-12)
    first, second = exact_orders(policy, exact.space, direction)
    found = measure_orders(
        curve.scales.numpy(),
        curve.changes.numpy(),
        None if curve.left_out is None else curve.left_out.numpy(),
        effective_sample_sizes=curve.effective_sample_sizes.numpy(),
        sequences=curve.sequences,
        slope=dot(entropy_gradient(policy, batch, "split"), direction),
    )
    assert found.first_order.value == pytest.approx(first, rel=1e-10)
    assert found.second_order.value == pytest.approx(second, rel=1e-2)
    json.dumps(json_of(found), allow_nan=False)


def test_measured_curve_leaves_out_each_prompt():
    world = make_step(learning_rate=1e-2)
    curve = measure_curve(world.model, world.step.parameter_delta, (1.0, -0.5), world.evaluation, world.statistics)
    assert curve.left_out is not None and curve.left_out.shape == (24, 2)
    for column, scale in enumerate((1.0, -0.5)):
        with weights_moved(world.model, world.step.parameter_delta, scale):
            after = token_statistics(world.model, world.evaluation)
        whole = snis_entropy_change(world.statistics, after, world.evaluation)
        assert curve.changes[column] == pytest.approx(whole.change, rel=1e-12)
        others = curve.left_out[:, column]
        spread = math.sqrt(23 / 24 * float((others - others.mean()).square().sum()))
        assert spread == pytest.approx(whole.standard_error, rel=1e-9), "leave-one-out values of something else"
    single = world.evaluation.select([0])
    alone = measure_curve(
        world.model, world.step.parameter_delta, (1.0,), single, token_statistics(world.model, single)
    )
    assert alone.left_out is None


def polynomial(s: np.ndarray, *coefficients: float) -> np.ndarray:
    return sum((c * s ** (k + 1) for k, c in enumerate(coefficients)), np.zeros_like(s))


def test_a_polynomial_of_order_four_is_recovered():
    found = measure_orders(SCALES, polynomial(SCALES, -0.08, 0.02, 0.005, -0.001))
    assert found.first_order.value == pytest.approx(-0.08)
    assert found.second_order.value == pytest.approx(0.02)
    assert (found.third, found.fourth) == (pytest.approx(0.005), pytest.approx(-0.001))
    assert found.residual < 1e-15 and found.second_order.fit_error < 1e-12
    assert found.equal_at.value == pytest.approx(4.0)
    assert found.ratio == pytest.approx(-0.25)
    assert [p.scale for p in found.points] == sorted(SCALES.tolist())
    assert found.points[-1].second_order == pytest.approx(-0.06)


def test_jackknife_error_of_the_second_order():
    """Every prompt has its own polynomial: the error of the mean's Q is that of a mean of Q's, whatever the fit."""
    rng = np.random.default_rng(0)
    prompts = rng.normal([-0.1, 0.03, 0.0, 0.0], [0.05, 0.02, 0.01, 0.01], size=(30, 4))
    curves = np.stack([polynomial(SCALES, *row) for row in prompts])
    left_out = (curves.sum(0) - curves) / 29
    found = measure_orders(SCALES, curves.mean(0), left_out)
    for order, name in ((0, "first_order"), (1, "second_order")):
        assert getattr(found, name).value == pytest.approx(prompts[:, order].mean())
        assert getattr(found, name).standard_error == pytest.approx(prompts[:, order].std(ddof=1) / math.sqrt(30))
    point = found.points[-1]
    assert point.standard_error == pytest.approx(curves[:, 0].std(ddof=1) / math.sqrt(30))
    (d, d_error), (q, q_error) = (
        (abs(getattr(found, name).value), stats.t.ppf(0.975, 29) * getattr(found, name).standard_error)
        for name in ("first_order", "second_order")
    )
    assert found.equal_at.value == pytest.approx(d / q)
    assert found.equal_at.low == pytest.approx((d - d_error) / (q + q_error))
    assert found.equal_at.high == pytest.approx((d + d_error) / (q - q_error))


def test_the_interval_of_equality_is_open_where_the_second_order_may_be_zero():
    left_out = np.stack([polynomial(SCALES, -1.0, 0.01 + e) for e in (-0.2, 0.2, -0.1, 0.1)])
    found = measure_orders(SCALES, polynomial(SCALES, -1.0, 0.01), left_out)
    assert found.equal_at.high is None and 0 < found.equal_at.low < 100
    assert "upwards without an end" in higher_order_finding(found)


def test_points_not_to_be_trusted_or_beyond_reach_are_not_used():
    changes = polynomial(SCALES, -0.1, 0.02)
    changes[np.abs(SCALES) == 1.0] = 7.0
    sizes = np.where(SCALES == 1.0, 31.0, 60.0)
    found = measure_orders(SCALES, changes, effective_sample_sizes=sizes, sequences=64)
    assert found.second_order.value == pytest.approx(0.02) and found.pairs == 4
    assert [p.used for p in found.points] == [False] + [True] * 8 + [False]
    near = measure_orders(SCALES, changes, furthest=0.5)
    assert near.second_order.value == pytest.approx(0.02)


def test_lone_scales_and_single_pairs():
    one_sided = measure_orders(np.array([0.5, 1.0]), np.array([1.0, 2.0]))
    assert one_sided.second_order.value is None and "both directions" in one_sided.reason
    assert "was not measured" in higher_order_finding(one_sided)
    pair = measure_orders(np.array([0.5, -0.5]), np.array([-0.04, 0.06]))
    assert (pair.first_order.value, pair.second_order.value) == (pytest.approx(-0.1), pytest.approx(0.04))
    assert pair.third is None and pair.second_order.total_error is None
    straight = measure_orders(SCALES, np.zeros(10))
    assert straight.equal_at.value is None and straight.reason == "the second order is exactly 0"
    assert straight.ratio is None
    for found in (one_sided, pair, straight):
        json.dumps(json_of(found), allow_nan=False)


@pytest.mark.parametrize(
    ("scales", "changes", "words"),
    [
        ([1.0, 1.0], [0.0, 0.0], "different from each other"),
        ([0.0, 1.0], [0.0, 0.0], "from 0"),
        ([1.0, -1.0], [0.0], "do not fit together"),
        ([1.0, -1.0], [0.0, math.nan], "not finite"),
    ],
)
def test_bad_curves(scales, changes, words):
    with pytest.raises(ValueError, match=words):
        measure_orders(np.array(scales), np.array(changes))


def test_the_figure_draws_the_curve_and_marks_where_orders_are_equal():
    found = measure_orders(SCALES, polynomial(SCALES, -0.08, 0.16))
    figure = plot_higher_order(found)
    left = figure.axes[0]
    lines = {str(line.get_label()): line for line in left.lines}
    s = np.asarray(lines["first order"].get_xdata(), float)
    assert np.asarray(lines["first order"].get_ydata(), float) == pytest.approx(-0.08 * s)
    assert np.asarray(lines["first and second order"].get_ydata(), float) == pytest.approx(-0.08 * s + 0.16 * s**2)
    assert [text.get_text() for text in left.texts] == ["s* = 0.5"]
    assert "they are equal in size at s* = 0.5" in caption_of(figure)
    other_way = plot_higher_order(measure_orders(SCALES, polynomial(SCALES, 0.08, 0.16)))
    assert [text.get_text() for text in other_way.axes[0].texts] == ["−s* = −0.5"]
    far = plot_higher_order(measure_orders(SCALES, polynomial(SCALES, -0.08, 0.02)))
    assert not far.axes[0].texts and png_bytes(far)


def test_figures_without_a_second_order():
    assert "No data" in caption_of(plot_higher_order(measure_orders(np.empty(0), np.empty(0))))
    assert "not known" in caption_of(plot_higher_order(measure_orders(np.array([0.5, 1.0]), np.array([1.0, 2.0]))))
    assert png_bytes(plot_higher_order(measure_orders(SCALES, np.zeros(10))))
