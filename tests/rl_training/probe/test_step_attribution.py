"""Each training sequence's share of a step: adds up, equals the long way, and is refused where it has no meaning."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients
from entropy_core.processes import Processes
from rl_training.probe.metrics import metrics_of
from rl_training.probe.shares import TrainingSequences, attribute_sequences
from rl_training.probe.step_parts import step_per_gradient
from tests.oracle.comparison import assert_close
from tests.oracle.enumeration import flatten, token_terms, unflatten
from tests.rl_training.probe_setting import BETA1, MAX_NORM, RATES, Setting, along, by_group, make_probe

TAUGHT = 4


@pytest.fixture
def setting() -> Setting:
    setting = Setting.fresh()
    for seed in range(TAUGHT):
        setting.step(seed)
    return setting


def shares_by_hand(setting: Setting, gradient: torch.Tensor, clip: float) -> torch.Tensor:
    """eta (1 - beta1)/(1 - beta1^t) c w_i <grad h, P grad S_i>, rows and P from the oracle and by hand."""
    chosen, training = setting.training(TAUGHT)
    rates, by_hand = by_group(setting.model, RATES), setting.parts_by_hand()
    steps = {name: t for name, (_, _, t) in setting.moments().items()}
    scale = {
        name: rates[name] * (1 - BETA1) / (1 - BETA1 ** (steps[name] + 1)) * by_hand["P"][name] for name in by_hand["P"]
    }
    rows = setting.exact().score_rows[chosen]
    return clip * training.weights * (rows @ (gradient * flatten(scale)))


@pytest.mark.parametrize("norm", [MAX_NORM, 1e3], ids=["clipped", "not_clipped"])
def test_shares_are_those_of_the_formula_and_add_up_to_the_batch_part(setting, norm):
    gradient = setting.gradients()[0]
    clip = setting.backward(TAUGHT, norm)
    assert (clip < 0.9) == (norm == MAX_NORM), "the test must see the coefficient of clipping"
    wanted = shares_by_hand(setting, gradient, clip)
    probe = make_probe(setting, mode="attribution")
    probe.observe(setting.batch, setting.counting_scores())
    probe.before_step(setting.optimizer, setting.training(TAUGHT)[1])
    setting.optimizer.step()
    change = probe.after_step()
    assert change is not None and change.shares is not None
    # Clipping is to within its 1e-6 of the norm, and this test computes its coefficient as torch does.
    assert_close(
        change.shares, wanted, 1e-6, "shares", {"momentum in every one": wanted / (1 - BETA1), "sign": -wanted}
    )
    assert_close(float(change.shares.sum()), change.batch.value, 1e-9, "the shares do not add up to the batch's part")
    assert change.shares.shape == (20,) and bool((change.shares > 0).any()) and bool((change.shares < 0).any())


def change_of_real_step(setting: Setting, gradient: torch.Tensor, weights: torch.Tensor, norm: float) -> float:
    """<grad h, theta_after - theta_before> of a copy of the model and of torch's own optimizer, clipped by torch."""
    model, optimizer = copy.deepcopy((setting.model, setting.optimizer))
    named, chosen = dict(model.named_parameters()), setting.training(TAUGHT)[0]
    loss = unflatten(-(weights @ setting.exact().score_rows[chosen]), setting.values())
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, p in named.items():
        p.grad = loss[name].clone()
    torch.nn.utils.clip_grad_norm_(named.values(), norm)
    optimizer.step()
    return along(gradient, {name: p.detach() - before[name] for name, p in named.items()})


@pytest.mark.long
@pytest.mark.parametrize("norm", [MAX_NORM, 1e3], ids=["clipped", "not_clipped"])
def test_effects_are_how_the_real_step_answers_to_a_sequences_weight(setting, norm):
    gradient = setting.gradients()[0]
    clip = setting.backward(TAUGHT, norm)
    assert (clip < 0.9) == (norm == MAX_NORM), "the test must see the coefficient of clipping"
    training = setting.training(TAUGHT)[1]
    probe = make_probe(setting, mode="attribution")
    probe.observe(setting.batch, setting.counting_scores())
    probe.before_step(setting.optimizer, training)
    expected = []
    for i in range(20):
        sides = []
        for sign in (1, -1):
            moved = training.weights.double().clone()
            moved[i] *= 1 + sign * 1e-4
            sides.append(change_of_real_step(setting, gradient, moved, norm))
        expected.append((sides[0] - sides[1]) / 2e-4)
    setting.optimizer.step()
    change = probe.after_step()
    assert change.effects is not None and change.shares is not None
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert_close(change.effects, wanted, 1e-5, "effects", {"the accounting shares": change.shares})
    assert "largest_effect" in metrics_of(change)
    assert float((change.effects - change.shares).abs().max()) > 0.05 * float(change.shares.abs().max())


@pytest.mark.parametrize("preconditioning", ["previous_step", "none"])
def test_steps_whose_p_is_not_their_own_have_shares_and_no_effects(setting, preconditioning):
    probe = make_probe(setting, mode="attribution", preconditioning=preconditioning)
    change = setting.watched_step(TAUGHT, probe, training=True)
    assert change.shares is not None and change.effects is None and "largest_effect" not in metrics_of(change)


def test_at_the_optimizers_first_step_there_are_no_effects():
    """It is the gradient's sign, and its derivative next to nothing."""
    setting = Setting.fresh()
    change = setting.watched_step(0, make_probe(setting, mode="attribution"), training=True)
    assert change.shares is not None and change.effects is None


@pytest.mark.parametrize("preconditioning", ["actual", "previous_step", "none"])
@pytest.mark.parametrize("rollouts", ["current", "fresh"])
def test_shares_add_up_whatever_the_step_and_the_average(setting, preconditioning, rollouts):
    """Under `current` the shares are along the average of earlier steps, as the batch part is."""
    probe = make_probe(
        setting,
        mode="attribution",
        preconditioning=preconditioning,
        rollouts=rollouts,
        averaging=0.7,
        estimator="split",
    )
    for step in range(TAUGHT, TAUGHT + 3):
        change = setting.watched_step(step, probe, training=True)
        assert_close(float(change.shares.sum()), change.batch.value, 1e-9, f"step {step}")


def test_shares_of_a_gradient_free_step_are_zero(setting):
    """All advantages zero: no gradient, no shares, no error."""
    _, training = setting.training(TAUGHT)
    setting.optimizer.zero_grad()
    for p in setting.model.parameters():
        p.grad = torch.zeros_like(p)
    none = replace(training, weights=torch.zeros(20, dtype=torch.float64))
    probe = make_probe(setting, mode="attribution")
    probe.observe(setting.batch, setting.counting_scores())
    probe.before_step(setting.optimizer, none)
    setting.optimizer.step()
    change = probe.after_step()
    assert not change.shares.any() and change.batch.value == 0.0 and change.momentum.value != 0.0


def shares_of(setting: Setting, training: TrainingSequences) -> torch.Tensor:
    named = dict(setting.model.named_parameters())
    gradient = unflatten(setting.gradients()[0], setting.values())
    scale = step_per_gradient(named, setting.optimizer, "actual")
    return attribute_sequences(setting.model, training, gradient, scale, Processes()).shares


def test_a_loss_that_is_not_the_weighted_sum_of_scores_is_refused(setting):
    chosen, training = setting.training(TAUGHT)
    setting.backward(TAUGHT)
    assert shares_of(setting, training).shape == (20,)
    with pytest.raises(ValueError, match="not the weighted sum of scores.*left over.*mode=simple"):
        shares_of(setting, replace(training, weights=training.weights.roll(1)))
    # A KL term of a hundredth of the gradient's size: small enough to be missed by eye.
    reference = token_terms(setting.model, setting.space)[0].detach()[chosen] - 0.1 * torch.randn(20, 4).double()
    now = token_terms(setting.model, setting.space)[0][chosen]
    (0.02 * ((reference - now).exp() - (reference - now) - 1).sum(1).mean()).backward()
    with pytest.raises(ValueError, match="another term"):
        shares_of(setting, training)


def test_the_gradient_of_other_sequences_is_refused_but_a_constant_is_clipping(setting):
    setting.backward(TAUGHT + 1)
    with pytest.raises(ValueError, match="left over"):
        shares_of(setting, setting.training(TAUGHT)[1])
    setting.backward(TAUGHT)
    shares = shares_of(setting, setting.training(TAUGHT)[1])
    _, training = setting.training(TAUGHT)
    doubled = shares_of(setting, replace(training, weights=2 * training.weights))
    torch.testing.assert_close(doubled, shares)


def test_weights_that_are_not_known_are_refused(setting):
    setting.backward(TAUGHT)
    with pytest.raises(ValueError, match="weight in the loss, which is not known"):
        shares_of(setting, replace(setting.training(TAUGHT)[1], weights=None))


def test_gradients_of_zero_weights_but_another_loss_are_refused(setting):
    """Zero advantages, and yet a gradient: an entropy bonus, say."""
    _, training = setting.training(TAUGHT)
    setting.backward(TAUGHT)
    with pytest.raises(ValueError, match="100.00% of it is left over"):
        shares_of(setting, replace(training, weights=torch.zeros(20, dtype=torch.float64)))


def test_shares_over_the_long_way_on_any_weights(setting):
    """Taking one sequence's gradient out of the step takes exactly its share out of the prediction."""
    chosen, training = setting.training(TAUGHT)
    setting.backward(TAUGHT, 1e3)
    shares, gradient = shares_of(setting, training), setting.gradients()[0]
    scale = step_per_gradient(dict(setting.model.named_parameters()), setting.optimizer, "actual")
    for n in (0, 7, 19):
        one = training.batch.select([n])
        row = batch_gradients(setting.model, one, [score_coefficients(one)])[0]
        alone = {name: float(training.weights[n]) * scale[name] * row[name] for name in row}
        assert_close(float(shares[n]), along(gradient, alone), 1e-9, f"sequence {n}")


@pytest.mark.parametrize(
    ("factor", "max_norm", "said"),
    [(1.0, MAX_NORM, None), (0.5, MAX_NORM, "0.5"), (0.5, 0.0, "0.5"), (3.0, None, "3"), (1.0, None, None)],
    ids=["clipped", "halved_after_clipping", "halved_unclipped", "normalised_up", "limit_unknown"],
)
def test_a_gradient_that_a_callback_scales_has_shares_and_no_effects(setting, factor, max_norm, said):
    """Effects hold how clipping by the norm answers: of another scaling nobody knows how it would."""
    norm = MAX_NORM if said is None or max_norm else 1e3
    setting.backward(TAUGHT, norm)
    for p in setting.model.parameters():
        p.grad.mul_(factor)
    probe = make_probe(setting, mode="attribution")
    probe.observe(setting.batch, setting.counting_scores())
    training = replace(setting.training(TAUGHT)[1], max_norm=max_norm)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        probe.before_step(setting.optimizer, training)
    words = [str(w.message) for w in found if "scales or clips it" in str(w.message)]
    setting.optimizer.step()
    change = probe.after_step()
    assert_close(float(change.shares.sum()), change.batch.value, 1e-9, "the shares do not add up to the batch's part")
    assert (change.effects is None) is bool(words) is (said is not None)
