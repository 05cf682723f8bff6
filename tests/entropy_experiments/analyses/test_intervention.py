"""Half-subsets, the linear datamodelling score, and real steps of a tiny policy held against shares."""

from __future__ import annotations

import copy
import json
from functools import cache

import numpy as np
import pytest
import torch

from entropy_core.directional import weights_moved
from entropy_core.measurement import fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.scores import token_statistics
from entropy_experiments.analyses.attribution import extreme_sequences
from entropy_experiments.analyses.intervention import (
    Halves,
    SharePrediction,
    half_subsets,
    prove_by_intervention,
)
from entropy_experiments.records.record import json_of
from entropy_experiments.report.figures.intervention import plot_intervention
from entropy_experiments.report.figures.style import caption_of, png_bytes
from entropy_experiments.report.findings import intervention_finding
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows
from entropy_experiments.step.optimizer_step import take_next_step
from entropy_experiments.step.real_steps import StepMeasurement
from rl_training.errors import UserError
from tests.entropy_experiments.analyses.tiny_step import TinyStep, make_step
from tests.oracle.comparison import assert_close


@cache
def settled_step() -> TinyStep:
    return make_step()


# ---- subsets


def test_halves_are_halves_all_different_and_repeatable():
    subsets = half_subsets(9, 40, seed=3)
    assert subsets.shape == (40, 9) and (subsets.sum(1) == 4).all()
    assert len({row.tobytes() for row in subsets}) == 40
    assert np.array_equal(subsets, half_subsets(9, 40, seed=3))
    assert not np.array_equal(subsets, half_subsets(9, 40, seed=4))


def test_every_half_is_equally_likely():
    """All 6 halves of 4 in any order; over 400 seeds each is first 66.7 times on average, with a deviation of 7.5."""
    firsts = np.array([half_subsets(4, 6, seed)[0] for seed in range(400)])
    counts = np.unique(firsts, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and (np.abs(counts - 400 / 6) < 4 * 7.5).all()


def test_halves_of_prompts_keep_prompts_whole():
    prompts = np.array([5, 5, 7, 7, 7, 2, 2, 9])
    subsets = half_subsets(prompts, 6)
    for row in subsets:
        assert all(len(set(row[prompts == p])) == 1 for p in np.unique(prompts)), "a prompt was torn apart"
        assert len(set(prompts[row])) == 2


@pytest.mark.parametrize("units", [1, 0, 4, np.array([1, 1, 1])])
def test_too_few_halves_are_refused(units):
    with pytest.raises(UserError, match="ways, and 40 subsets are asked for"):
        half_subsets(units, 40)


# ---- the whole proof on a linear world


def linear_world(n: int = 12):
    rng = np.random.default_rng(1)
    effects, weights = rng.normal(size=n), rng.normal(size=n)
    weights[4] = 0.0

    def measure(kept: torch.Tensor) -> float:
        assert kept.dtype == torch.float64 and kept.shape == (n,)
        return 0.25 + float(kept @ torch.from_numpy(effects))

    return measure, weights, SharePrediction(weights * effects, 0.25)


def test_a_linear_world_is_proven_exactly():
    measure, weights, prediction = linear_world()
    wrong = SharePrediction(-prediction.shares, 0.25)
    found = prove_by_intervention(measure, weights, {"right": prediction, "wrong": wrong}, top=3)
    assert found.headline == "right"
    assert found.scores["right"].spearman == pytest.approx(1.0)
    assert found.scores["right"].slope == pytest.approx(1.0)
    assert found.scores["wrong"].spearman == pytest.approx(-1.0)
    assert found.full_step.measured == pytest.approx(found.full_step.predicted["right"])
    assert not any(4 in members for members in found.subsets), "a sequence of weight 0 takes part in no step"
    for kind, sign in (("lowering", -1), ("raising", 1)):
        removal = getattr(found.removals, kind)
        assert removal.difference == pytest.approx(-prediction.shares[list(removal.sequences)].sum())
        assert removal.difference == pytest.approx(removal.predicted_difference["right"])
        assert removal.difference * sign < 0 and len(removal.sequences) == 3
    assert len(found.removals.random.differences) == 5
    assert "trusted" not in intervention_finding(found.model_copy(update={"effective_part": 0.5}))
    doubtful = intervention_finding(found.model_copy(update={"effective_part": 0.2}))
    assert "of some of these steps the measurement is not to be trusted" in doubtful and "(down to 20%)" in doubtful
    assert "1.00 [1.00, 1.00]" in intervention_finding(found) and "said to lower entropy most" in intervention_finding(
        found
    )
    json.dumps(json_of(found), allow_nan=False)


def test_halving_prompts():
    measure, weights, prediction = linear_world()
    prompts = np.arange(12) // 2
    found = prove_by_intervention(measure, weights, {"shares": prediction}, halves=Halves(15, prompts), top=2)
    assert found.by == "prompt" and found.scores["shares"].spearman == pytest.approx(1.0)


def test_degenerate_worlds_are_stated():
    """No effect at all, and one-sided shares: nothing is NaN, and the sentence says what is missing."""
    weights = np.ones(8)
    found = prove_by_intervention(
        lambda kept: 0.0, weights, {"shares": SharePrediction(np.zeros(8))}, halves=Halves(20)
    )
    assert found.removals.lowering is None and found.removals.raising is None
    assert "no rank correlation can be given: all predicted changes are equal" in intervention_finding(found)
    json.dumps(json_of(found), allow_nan=False)
    with pytest.raises(UserError, match="0 ways"):
        prove_by_intervention(lambda kept: 0.0, np.zeros(8), {"shares": SharePrediction(np.zeros(8))})


# ---- real steps


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-3])
def test_real_half_steps_follow_the_split_shares(learning_rate):
    """Settled second moments, no clipping: what is left between prediction and measurement is curvature."""
    world = settled_step() if learning_rate == 1e-5 else make_step(learning_rate)
    measurement = world.measurement()
    predictions = {"split": world.prediction(), "rao_blackwell": world.prediction("rao_blackwell")}
    found = prove_by_intervention(measurement.change, world.weights.numpy(), predictions, clip=measurement.clip, top=3)
    score, other = found.scores["split"], found.scores["rao_blackwell"]
    assert score.spearman >= (0.995 if learning_rate == 1e-5 else 0.98)
    assert abs(score.slope - 1) < 0.05, "shares and measurement differ by a factor"
    assert score.root_mean_square_error < 0.12 * score.measured_spread
    assert other.spearman < score.spearman, "the other estimator has the evaluation tokens' noise against it"
    assert found.removals.lowering.difference > 0 > found.removals.raising.difference
    assert measurement.lowest_effective_sample_size is not None


def test_a_poisoned_sequence_is_found_and_its_removal_undoes_the_loss():
    victim = extreme_sequences(settled_step().shares().numpy(), 1)[0][0]
    world = make_step(poison=(victim, 400.0))
    shares = world.shares().numpy()
    measurement = world.measurement()
    found = prove_by_intervention(measurement.change, world.weights.numpy(), {"split": world.prediction()}, top=1)
    removal = found.removals.lowering
    assert removal.sequences == (victim,)
    assert removal.difference == pytest.approx(-shares[victim], rel=0.05)
    assert shares[victim] < -20 * np.abs(np.delete(shares, victim)).max(), "the world is not poisoned"
    with_victim = np.array([victim in members for members in found.subsets])
    measured = np.array(found.measured)
    assert measured[with_victim].max() < measured[~with_victim].min()


def test_clipping_is_predicted_by_the_ratio_of_coefficients():
    world = make_step(max_norm=0.05)
    assert world.step.clip < 0.2
    measurement = world.measurement()
    shares = world.prediction()
    blind = SharePrediction(shares.shares, shares.rest, with_clipping=False)
    found = prove_by_intervention(
        measurement.change, world.weights.numpy(), {"scaled": shares, "blind": blind}, clip=measurement.clip, top=3
    )
    scaled, blind_score = found.scores["scaled"], found.scores["blind"]
    assert scaled.spearman > 0.99 and abs(scaled.slope - 1) < 0.05
    assert scaled.root_mean_square_error < 0.2 * blind_score.root_mean_square_error
    assert min(found.clip_ratios) > 1, "half of a clipped gradient is clipped less"
    for kind in ("lowering", "raising"):
        removal = getattr(found.removals, kind)
        gap, gap_blind = (abs(removal.predicted_difference[n] - removal.difference) for n in ("scaled", "blind"))
        assert gap < 0.1 * abs(removal.difference) and gap < gap_blind, "removals are predicted without clipping"


def test_measurement_is_a_step_of_torchs_own_optimizer():
    """Against AdamW on a deep copy, with gradients set by hand."""
    world = settled_step()
    weights = world.weights * torch.tensor([1.0, 0.0] * 8)
    found = world.measurement().measure(weights)
    pair = copy.deepcopy((world.model, world.optimizer))
    model, optimizer = pair
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = -torch.einsum("n,n...->...", weights, world.columns[name])
    optimizer.step()
    after = token_statistics(model, world.evaluation)
    assert found.change == pytest.approx(
        snis_entropy_change(world.statistics, after, world.evaluation).change, rel=1e-9
    )
    log_weights = torch.linspace(-1, 1, len(world.evaluation), dtype=torch.float64)
    other = StepMeasurement(
        world.model, world.optimizer, KeptRows(world.columns), world.evaluation, world.statistics,
        max_grad_norm=None, log_weights=log_weights, measure=fixed_prefix_entropy_change,
    )  # fmt: skip
    expected = fixed_prefix_entropy_change(world.statistics, after, world.evaluation, log_weights=log_weights)
    assert other.change(weights) == pytest.approx(expected.change, rel=1e-9)


def test_measuring_leaves_model_and_optimizer_bit_identical():
    world = make_step(learning_rate=1e-3, max_norm=0.05)
    parameters = {name: p.detach().clone() for name, p in world.model.named_parameters()}
    state = copy.deepcopy(world.optimizer.state_dict())
    measurement = world.measurement()
    measurement.measure(world.weights)
    measurement.response_shares(world.gradient_of_h(), world.weights, torch.from_numpy(half_subsets(16, 2)))
    assert all(torch.equal(p, parameters[name]) for name, p in world.model.named_parameters())
    after = world.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for index, entry in state["state"].items():
        assert all(torch.equal(entry[key], after["state"][index][key]) for key in entry)


def test_rows_that_are_not_kept_give_the_same_step_and_shares():
    world = settled_step()
    known = (world.model, world.optimizer, RecomputedRows(world.model, world.train), world.evaluation, world.statistics)
    other, subsets = StepMeasurement(*known, max_grad_norm=None), torch.from_numpy(half_subsets(16, 4))
    assert other.change(world.weights) == pytest.approx(world.measurement().change(world.weights), rel=1e-9)
    shares = [
        m.response_shares(world.gradient_of_h(), world.weights, subsets).shares for m in (other, world.measurement())
    ]
    assert_close(*shares, 1e-9, "rows formed anew")


def test_response_shares_are_the_derivative_of_the_first_order():
    """Against a central difference of <grad h, dtheta(a)> in each a_i, clipping and unsettled moments and all."""
    world = make_step(learning_rate=1e-3, max_norm=0.05, settled=False)
    measurement, gradient = world.measurement(), world.gradient_of_h()
    subsets = torch.from_numpy(half_subsets(16, 2, seed=5)).double()
    found = measurement.response_shares(gradient, world.weights, subsets)
    expected, constant = torch.zeros(16, dtype=torch.float64), 0.0
    for row in subsets:
        for i in range(16):
            ends = [
                measurement.first_order(gradient, (row + e * torch.eye(16)[i]) * world.weights) for e in (1e-4, -1e-4)
            ]
            expected[i] += (ends[0] - ends[1]) / 2e-4 / len(subsets)
        constant += measurement.first_order(gradient, row * world.weights) / len(subsets)
    assert_close(found.shares, expected, 1e-4, "dF/da", {"no clipping, settled P": world.shares()})
    assert found.rest == pytest.approx(constant - float((subsets @ found.shares).mean()), abs=1e-12)


def test_response_shares_beat_frozen_ones_where_second_moments_move():
    world = make_step(learning_rate=1e-5, settled=False)
    measurement = world.measurement()
    r = measurement.response_shares(
        world.gradient_of_h(), world.weights, torch.from_numpy(half_subsets(16, 16, seed=9))
    )
    predictions = {
        "frozen": world.prediction(),
        "response": SharePrediction(r.shares.numpy(), r.rest, with_clipping=False),
    }
    found = prove_by_intervention(measurement.change, world.weights.numpy(), predictions, top=3)
    frozen, response = found.scores["frozen"], found.scores["response"]
    assert frozen.spearman > 0.9 and response.spearman > 0.9
    assert response.root_mean_square_error < 1.1 * frozen.root_mean_square_error


def test_response_equals_shares_where_the_step_is_linear():
    """With second moments that a batch cannot move, r_i is the share, and the constant is momentum and decay."""
    world = make_step()
    for state in world.optimizer.state.values():
        state["exp_avg_sq"] *= 1e8
    step = take_next_step(world.model, world.optimizer, world.measurement().gradient(world.weights), None)
    frozen = TinyStep(**{**world.__dict__, "step": step})
    found = frozen.measurement().response_shares(
        frozen.gradient_of_h(), frozen.weights, torch.from_numpy(half_subsets(16, 4))
    )
    assert_close(found.shares, frozen.shares(), 1e-6, "response shares of a linear step are the shares")
    assert found.rest == pytest.approx(frozen.prediction().rest, rel=1e-5)


def test_plain_gradient_steps():
    world = settled_step()
    measurement = StepMeasurement(
        world.model,
        None,
        KeptRows(world.columns),
        world.evaluation,
        world.statistics,
        max_grad_norm=None,
        learning_rate=0.1,
    )
    taken = measurement.step(world.weights)
    gradient = measurement.gradient(world.weights)
    assert all(torch.equal(taken[name], -0.1 * gradient[name]) for name in gradient)
    with weights_moved(world.model, taken, 1.0):
        after = token_statistics(world.model, world.evaluation)
    expected = snis_entropy_change(world.statistics, after, world.evaluation).change
    assert measurement.change(world.weights) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="second moments"):
        measurement.response_shares(world.gradient_of_h(), world.weights, torch.ones(1, 16))


def test_bad_measurement_input():
    world = settled_step()
    with pytest.raises(UserError, match="give a learning rate"):
        StepMeasurement(world.model, None, KeptRows(world.columns), world.evaluation, world.statistics)
    with pytest.raises(ValueError, match="16 rows"):
        world.measurement().change(world.weights[:5])


# ---- the figure


def test_the_figure_draws_the_numbers():
    measure, weights, prediction = linear_world()
    found = prove_by_intervention(measure, weights, {"split": prediction, "response": prediction}, top=3)
    figure = plot_intervention(found)
    scatter = next(line for line in figure.axes[0].lines if "random halves" in str(line.get_label()))
    x, y = np.asarray(scatter.get_xdata(), float), np.asarray(scatter.get_ydata(), float)
    unit = y[0] / found.measured[0]
    assert np.log10(unit) == pytest.approx(round(np.log10(unit)))
    assert y == pytest.approx(unit * np.array(found.measured))
    assert x == pytest.approx(unit * np.array(found.scores["split"].predicted))
    widths = [bar.get_width() for bar in figure.axes[1].patches]
    wanted = [found.full_step.measured, *(getattr(found.removals, k).measured for k in ("lowering", "raising"))]
    assert widths == pytest.approx([unit * value for value in wanted])
    assert "1.00, 95% bootstrap interval" in caption_of(figure) and "second moments" in caption_of(figure)
    assert png_bytes(figure)


def test_figures_of_nothing():
    still = prove_by_intervention(
        lambda kept: 0.0, np.ones(8), {"split": SharePrediction(np.zeros(8))}, halves=Halves(20)
    )
    assert "all predicted changes are equal" in caption_of(plot_intervention(still))
