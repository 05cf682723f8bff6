"""The probe without any trainer, on a policy whose every completion is enumerated: numbers are exact, not estimates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_core.adamw import AdamWUpdate
from entropy_core.entropy import ESTIMATORS
from entropy_core.predictors import covariance_predictor, steer_predictor
from entropy_core.scores import token_statistics
from tests.oracle.comparison import assert_close
from tests.oracle.enumeration import ExactPolicy
from tests.rl_training.probe_setting import RATES, Setting, along, by_group, difference, make_probe

EXACT = 1e-9
TAUGHT = 4  # steps taken before a test looks: momentum and second moments are then of the size of the batch's part


@pytest.fixture
def setting() -> Setting:
    setting = Setting.fresh()
    for seed in range(TAUGHT):
        setting.step(seed)
    return setting


def exact_gradient(exact: ExactPolicy, estimator: str, per_token: bool) -> Tensor:
    """What each estimator is to give on a batch that is the policy's distribution."""
    wanted = exact.token_entropy_gradient if per_token else exact.sequence_entropy_gradient
    if estimator == "fixed_prefix":
        return exact.expectation(exact.entropy_gradients.sum(1)) / (exact.mean_length if per_token else 1.0)
    if estimator == "score_function":  # a sequence is left out of its own baseline among n completions of its prompt
        completions = len(exact.probabilities) // exact.space.prompts
        return wanted * completions / (completions - 1)
    return wanted


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_prediction_is_the_exact_directional_derivative_and_the_measurement_the_exact_change(setting, estimator):
    exact, before = setting.exact(), setting.values()
    setting.backward(TAUGHT)
    by_hand = setting.parts_by_hand()
    probe = make_probe(setting, estimator=estimator, per_completion=True)
    change = setting.watched_step(TAUGHT, probe)
    taken = difference(setting.values(), before)
    for parts, per_token in ((change.per_token, True), (change.per_completion, False)):
        gradient = exact_gradient(exact, estimator, per_token)
        wanted = along(gradient, taken)
        suspects = {
            "P is applied to the step again": along(gradient, {n: d * by_hand["P"][n] for n, d in taken.items()}),
            "momentum is left out": along(gradient, by_hand["batch"]),
            "the other unit": along(exact_gradient(exact, estimator, not per_token), taken),
        }
        assert_close(parts.total.value, wanted, 1e-8, "not the derivative along the step", suspects)
        for name in ("batch", "momentum", "decay"):
            assert_close(getattr(parts, name).value, along(gradient, by_hand[name]), EXACT, f"the part {name}")
        total = parts.batch.value + parts.momentum.value + parts.decay.value
        assert parts.total.value == pytest.approx(total, rel=1e-12)
    start, end = exact.token_entropy, setting.entropy()
    assert change.measured is not None and change.measured_fixed_prefix is not None
    assert_close(change.entropy, start, EXACT, "entropy before the step")
    assert_close(change.measured.before, start, EXACT, "measured before")
    assert_close(change.measured.change, end - start, EXACT, "the measured change is not h(after) - h(before)")
    assert change.measured_fixed_prefix.change != pytest.approx(change.measured.change, rel=1e-3)
    assert change.estimator == estimator and change.sequences == len(setting.batch)
    assert change.estimand == ("entropy on given tokens" if estimator == "fixed_prefix" else "entropy of the policy")
    weights = exact.probabilities
    assert_close(change.effective_sample_size, float(weights.sum() ** 2 / weights.square().sum()), EXACT, "ESS")
    assert (change.total, change.batch, change.momentum, change.decay) == (
        change.per_token.total, change.per_token.batch, change.per_token.momentum, change.per_token.decay,
    )  # fmt: skip


def test_the_prediction_goes_to_the_exact_one_as_the_batch_grows_to_all_completions(setting):
    """The likeliest completions first: what is missing of the distribution is what is missing of the prediction."""
    setting.backward(TAUGHT)
    parts = setting.parts_by_hand()
    update = {name: parts["batch"][name] + parts["momentum"][name] + parts["decay"][name] for name in parts["batch"]}
    exact = setting.exact()
    wanted = along(exact.token_entropy_gradient, update)
    order = exact.probabilities.argsort(descending=True)
    errors = []
    for count in (60, 180, 300, len(order)):
        part = setting.batch.select(order[:count])
        change = make_probe(setting).compute_delta_h_fast(part, None, update, setting.counting_scores()[:count])
        errors.append(abs(change.total.value / wanted - 1))
    assert errors[0] > 1e-2 and errors == sorted(errors, reverse=True) and errors[-1] < EXACT, errors


def test_first_order_over_measured_goes_to_one_as_the_step_shrinks(setting):
    """The curvature of h along the step is what parts them: the error halves with the learning rate."""
    errors = []
    for factor in (1 / 16, 1 / 32, 1 / 64):
        twin = setting.twin()
        for group in twin.optimizer.param_groups:
            group["lr"] *= factor
        change = twin.watched_step(TAUGHT, make_probe(twin))
        errors.append(abs(change.same_tokens / change.measured.change - 1))
        assert change.same_tokens == pytest.approx(change.total.value, rel=1e-12), "one gradient, no average"
    assert errors[-1] < 0.05 and 1.7 < errors[0] / errors[1] < 2.4 and 1.7 < errors[1] / errors[2] < 2.4, errors


# ---------------------------------------------------------------------- whose gradient predicts which part
@pytest.mark.parametrize("rollouts", ["current", "previous_step", "fresh"])
def test_the_running_average_predicts_and_lags_along_the_batchs_own_part(rollouts):
    """Step s is predicted by sum_j keep^j g_{s-j}; under `current` the batch's part by the average one step earlier."""
    setting, keep = Setting.fresh(), 0.6
    probe = make_probe(setting, rollouts=rollouts, averaging=keep)
    gradients: list[Tensor] = []

    def average(upto: int) -> Tensor:
        weights = [keep ** (upto - 1 - j) for j in range(upto)]
        return sum(w * g for w, g in zip(weights, gradients, strict=False)) / sum(weights)

    for step in range(4):
        gradients.append(setting.gradients()[0])
        setting.backward(step)
        parts = setting.parts_by_hand()
        change = setting.watched_step(step, probe)
        newest = average(step + 1)
        of_batch = average(step) if rollouts == "current" and step > 0 else newest
        assert_close(change.batch.value, along(of_batch, parts["batch"]), EXACT, f"batch part of step {step}")
        assert_close(change.momentum.value, along(newest, parts["momentum"]), EXACT, f"momentum part of step {step}")
        assert_close(change.decay.value, along(newest, parts["decay"]), EXACT, f"decay part of step {step}")
        step_taken = {name: sum(parts[k][name] for k in ("batch", "momentum", "decay")) for name in parts["P"]}
        assert_close(change.same_tokens, along(gradients[-1], step_taken), EXACT, "same_tokens is the newest alone")
        if step > 0 and rollouts == "current":
            assert change.batch.value != pytest.approx(along(newest, parts["batch"]), rel=1e-6), "the test is blind"


def test_between_refreshes_the_last_gradient_predicts_and_nothing_is_measured(setting):
    probe = make_probe(setting)
    gradient = setting.gradients()[0]
    setting.watched_step(TAUGHT, probe)
    before = setting.values()
    change = setting.step(TAUGHT + 1, probe)
    assert change is not None
    assert_close(change.total.value, along(gradient, difference(setting.values(), before)), 1e-8, "the kept gradient")
    assert change.measured is None and change.measured_fixed_prefix is None and change.sequences == 0
    assert math.isnan(change.same_tokens) and math.isnan(change.entropy) and math.isnan(change.effective_sample_size)


# ---------------------------------------------------------------------- other steps than AdamW's own
def test_plain_gradient_step_has_no_preconditioner_and_no_momentum(setting):
    exact = setting.exact()
    setting.backward(TAUGHT)
    rates = by_group(setting.model, RATES)
    plain = {name: -rates[name] * p.grad for name, p in setting.model.named_parameters()}
    change = setting.watched_step(TAUGHT, make_probe(setting, preconditioning="none"))
    assert_close(change.total.value, along(exact.token_entropy_gradient, plain), EXACT, "-lr g, after clipping")
    assert change.momentum.value == change.decay.value == 0.0 and change.batch.value == change.total.value
    assert change.measured is not None, "what the optimizer really did is measured all the same"


def test_previous_step_applies_the_preconditioner_before_the_step_once(setting):
    exact, rates = setting.exact(), by_group(setting.model, RATES)
    setting.backward(TAUGHT)
    expected, now = {}, setting.parts_by_hand()["P"]
    for name, p in setting.model.named_parameters():
        _, v, t = setting.moments()[name]
        expected[name] = -rates[name] * p.grad / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    with_new_moments = {n: -rates[n] * now[n] * p.grad for n, p in setting.model.named_parameters()}
    change = setting.watched_step(TAUGHT, make_probe(setting, preconditioning="previous_step"))
    assert_close(
        change.total.value,
        along(exact.token_entropy_gradient, expected),
        EXACT,
        "-lr P_{t-1} g",
        {"P of the step itself": along(exact.token_entropy_gradient, with_new_moments)},
    )
    assert change.momentum.value == change.decay.value == 0.0 and change.batch.value == change.total.value


def test_previous_step_predicts_nothing_before_there_is_a_preconditioner():
    setting = Setting.fresh()
    probe = make_probe(setting, preconditioning="previous_step", averaging=0.5)
    probe.observe(setting.batch, setting.counting_scores())
    assert setting.step(0, probe) is None
    gradients = [Setting.fresh().gradients()[0], setting.gradients()[0]]
    setting.backward(1)
    rates = by_group(setting.model, RATES)
    step = {}
    for name, p in setting.model.named_parameters():
        _, v, t = setting.moments()[name]
        step[name] = -rates[name] * p.grad / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    change = setting.watched_step(1, probe)
    average = (0.5 * gradients[0] + gradients[1]) / 1.5
    assert_close(change.total.value, along(average, step), EXACT, "the first step's gradient enters the average")


# ---------------------------------------------------------------------- one call
def update_of(setting: Setting) -> AdamWUpdate:
    setting.backward(TAUGHT)
    parts = setting.parts_by_hand()
    return AdamWUpdate(parts["batch"], parts["momentum"], parts["decay"])


def test_one_call_gives_every_part_of_an_adamw_update_in_both_units(setting):
    update, exact = update_of(setting), setting.exact()
    change = make_probe(setting).compute_delta_h_fast(setting.batch, None, update, setting.counting_scores())
    assert change.per_completion is not None
    for parts, gradient in (
        (change.per_token, exact.token_entropy_gradient),
        (change.per_completion, exact.sequence_entropy_gradient),
    ):
        for name, direction in (
            ("total", update.total()), ("batch", update.batch), ("momentum", update.momentum), ("decay", update.weight_decay)
        ):  # fmt: skip
            assert_close(getattr(parts, name).value, along(gradient, direction), EXACT, name)
            assert getattr(parts, name).standard_error > 0
    assert change.measured is None and change.predictors == {} and change.shares is None
    assert_close(change.entropy, exact.token_entropy, EXACT, "entropy now")
    assert change.sequences == len(setting.batch) and change.effective_sample_size < change.sequences


def test_one_call_with_a_bare_update_gives_its_total_alone_and_applies_no_preconditioner(setting):
    update, exact = update_of(setting).total(), setting.exact()
    change = make_probe(setting).compute_delta_h_fast(setting.batch, None, update, setting.counting_scores())
    assert_close(change.total.value, along(exact.token_entropy_gradient, update), EXACT, "<grad h, dtheta>")
    for part in (change.batch, change.momentum, change.decay, change.per_completion.batch):
        assert math.isnan(part.value) and math.isnan(part.standard_error)
    missing = {name: d for name, d in update.items() if name != "head.bias"}
    with pytest.raises(ValueError, match="head.bias"):
        make_probe(setting).compute_delta_h_fast(setting.batch, None, missing)


def test_one_call_with_advantages_adds_the_predictors_of_the_literature(setting):
    update = update_of(setting)
    _, training = setting.training(TAUGHT)
    change = make_probe(setting).compute_delta_h_fast(training.batch, training.advantages, update)
    statistics, mask = token_statistics(setting.model, training.batch), training.batch.completion_mask
    assert set(change.predictors) == {"covariance", "steer"}
    wanted = covariance_predictor(statistics.logprobs, mask, training.advantages, 1.0)
    assert change.predictors["covariance"] == pytest.approx(wanted, rel=1e-9) and wanted != 0
    wanted = steer_predictor(statistics.logprobs, statistics.entropies, mask, training.advantages, 1.0)
    assert change.predictors["steer"] == pytest.approx(wanted, rel=1e-9) and wanted != 0
    assert change.effective_sample_size == len(training.batch), "nothing was weighted"


def test_one_call_leaves_the_average_and_the_observation_alone(setting):
    probe = make_probe(setting, averaging=0.9)
    probe.observe(setting.batch, setting.counting_scores())
    update = update_of(setting)
    probe.compute_delta_h_fast(setting.batch.select(range(40)), None, update)
    exact = setting.exact()
    probe.before_step(setting.optimizer)
    setting.optimizer.step()
    change = probe.after_step()
    assert_close(change.total.value, along(exact.token_entropy_gradient, update.total()), EXACT, "the observed batch's")


# ---------------------------------------------------------------------- sequences of an earlier policy
def test_sequences_of_an_earlier_policy_and_uneven_prompts_are_weighted_to_todays(setting):
    """Scores of the policy that drew, and how likely each sequence's place in the batch was: still the exact derivative."""
    earlier = setting.exact()
    times = torch.tensor([3, 1, 2])[setting.batch.prompt_index]
    everything = torch.repeat_interleave(torch.arange(len(times)), times)
    drawn, places = earlier.scores[everything], times[everything].double()
    for seed in range(TAUGHT, TAUGHT + 3):
        setting.step(seed)
    gradient, entropy, before = setting.gradients()[0], setting.entropy(), setting.values()
    probe = make_probe(setting)
    # Each completion stands in the batch `times` times, not in the earlier distribution's proportion: a prior that undoes both.
    probe.observe(setting.batch.select(everything), drawn, prior_log_weights=drawn - places.log())
    change = setting.step(TAUGHT + 3, probe)
    assert change is not None and change.measured is not None
    taken = difference(setting.values(), before)
    suspects = {"the earlier policy's": along(earlier.token_entropy_gradient, taken)}
    assert_close(change.total.value, along(gradient, taken), 1e-8, "weights", suspects)
    assert_close(change.measured.change, setting.entropy() - entropy, EXACT, "measured")


# ---------------------------------------------------------------------- predictors beside
def test_rival_predictors_of_a_step(setting):
    exact, before = setting.exact(), setting.values()
    _, training = setting.training(TAUGHT)
    statistics, mask = token_statistics(setting.model, training.batch), training.batch.completion_mask
    probe = make_probe(setting, predictors=True)
    change = setting.watched_step(TAUGHT, probe, training=True)
    taken = difference(setting.values(), before)
    gradient = exact_gradient(exact, "score_function", True)
    assert_close(change.predictors["score_function"], along(gradient, taken), 1e-8, "the score-function estimate")
    assert change.predictors["without_momentum"] == change.batch.value
    rate = RATES[0]
    wanted = covariance_predictor(statistics.logprobs, mask, training.advantages, rate)
    assert change.predictors["covariance"] == pytest.approx(wanted, rel=1e-9)
    wanted = steer_predictor(statistics.logprobs, statistics.entropies, mask, training.advantages, rate)
    assert change.predictors["steer"] == pytest.approx(wanted, rel=1e-9)
    assert set(setting.watched_step(TAUGHT + 1, make_probe(setting, predictors=True)).predictors) == {
        "score_function",
        "without_momentum",
    }, "without the training sequences two remain"
