"""What the optimizer is about to do, in parts, and whether it did it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from rl_training.errors import UserError
from rl_training.probe.step_parts import step_per_gradient, unexplained, upcoming_step, why_not_split
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.enumeration import detached_parameters, exact_entropies, flatten, token_terms
from tests.rl_training.probe_setting import RATES, Setting, along, by_group, difference, make_probe

MODES = ("actual", "previous_step", "none")


@pytest.fixture
def setting() -> Setting:
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    setting.backward(3)
    return setting


def named(setting: Setting) -> dict[str, nn.Parameter]:
    return dict(setting.model.named_parameters())


def test_the_parts_are_those_of_the_formulas_and_sum_to_the_step(setting):
    by_hand, before = setting.parts_by_hand(), setting.values()
    update = upcoming_step(named(setting), setting.optimizer, "actual")
    assert_named_close(update.batch, by_hand["batch"], 1e-12, "batch")
    assert_named_close(update.momentum, by_hand["momentum"], 1e-12, "momentum")
    assert_named_close(update.weight_decay, by_hand["decay"], 1e-12, "decay")
    setting.optimizer.step()
    taken = difference(setting.values(), before)
    assert_named_close(update.total(), taken, 1e-9, "the parts do not sum to the step that was taken")


@pytest.mark.parametrize("how", MODES)
def test_the_batch_part_is_a_multiple_of_the_gradient(setting, how):
    """What attribution multiplies each sequence's gradient by."""
    update = upcoming_step(named(setting), setting.optimizer, how)
    factors = step_per_gradient(named(setting), setting.optimizer, how)
    rebuilt = {name: -factors[name] * p.grad for name, p in named(setting).items()}
    assert_named_close(rebuilt, update.batch, 1e-12, f"batch part of {how}")
    if how != "actual":
        assert not flatten(update.momentum).any() and not flatten(update.weight_decay).any()


@pytest.mark.parametrize("how", MODES)
def test_a_parameter_without_gradient_stays_where_it_is(setting, how):
    setting.model.head.bias.grad = None
    before = setting.values()
    update = upcoming_step(named(setting), setting.optimizer, how)
    for part in (update.batch, update.momentum, update.weight_decay):
        assert not part["head.bias"].any()
    factors = step_per_gradient(named(setting), setting.optimizer, how)
    assert "head.bias" in factors
    setting.optimizer.step()
    assert torch.equal(setting.values()["head.bias"], before["head.bias"])


def test_previous_step_knows_nothing_before_the_first_step():
    fresh = Setting.fresh()
    fresh.backward(0)
    assert upcoming_step(named(fresh), fresh.optimizer, "previous_step") is None
    assert upcoming_step(named(fresh), fresh.optimizer, "actual") is not None
    assert upcoming_step(named(fresh), fresh.optimizer, "none") is not None


class Cautious(torch.optim.AdamW):
    """A relative with AdamW's keys and a step of its own: it zeroes what the gradient speaks against."""

    def step(self, closure=None):
        before = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        super().step(closure)
        for group, starts in zip(self.param_groups, before, strict=True):
            for p, start in zip(group["params"], starts, strict=True):
                if p.grad is not None:
                    p.data = torch.where((p.data - start) * p.grad < 0, p.data, start)


class SignOfMomentum(torch.optim.Optimizer):
    """Lion: the sign of an interpolation of gradients, with decay."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (group["betas"][0] * m + (1 - group["betas"][0]) * p.grad).sign())
                m.lerp_(p.grad, 1 - group["betas"][1])


def with_setting(p) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(p, lr=1e-3)
    optimizer.param_groups[0]["cautious"] = True
    return optimizer


OTHER_OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "SignOfMomentum": SignOfMomentum,
    "Cautious": lambda p: Cautious(p, lr=1e-3),
    "maximize": lambda p: torch.optim.AdamW(p, lr=1e-3, maximize=True),
    "couples weight decay": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "cautious": with_setting,
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_without_known_parts_are_predicted_along_the_step_they_take(name):
    """The exact grad h along theta_after - theta_before, over steps with state; said once, with the reason."""
    setting = Setting.fresh()
    optimizer = OTHER_OPTIMIZERS[name](setting.model.parameters())
    probe = make_probe(setting, predictors=True, per_completion=True, estimator="rao_blackwell")
    with pytest.warns(RuntimeWarning) as seen:
        for seed in range(3):
            per_token, per_completion = setting.gradients()
            before = setting.values()
            setting.backward(seed)
            probe.observe(setting.batch, setting.counting_scores())
            probe.before_step(optimizer, setting.training(seed)[1])
            optimizer.step()
            change, taken = probe.after_step(), difference(setting.values(), before)
            assert_close(change.total.value, along(per_token, taken), 1e-9, f"<grad h, step taken> in step {seed}")
            assert_close(change.per_completion.total.value, along(per_completion, taken), 1e-9, "<grad H, step taken>")
            assert change.same_tokens == pytest.approx(change.total.value, rel=1e-9) and change.total.value != 0
            assert all(math.isnan(part.value) for part in (change.batch, change.momentum, change.decay))
            assert change.total.standard_error > 0
            assert change.predictors["score_function"] != 0 and change.predictors["covariance"] != 0
    # torch warns of itself where it is first used.
    said = [str(w.message) for w in seen if w.category is RuntimeWarning]
    assert len(said) == 1 and name.split()[0] in said[0] and "without parts" in said[0], said


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_steps_that_such_an_optimizer_does_not_take_are_refused(setting, name):
    optimizer = OTHER_OPTIMIZERS[name](setting.model.parameters())
    for how in ("previous_step", "none"):
        if (name, how) == ("SGD", "none"):
            plain = upcoming_step(named(setting), optimizer, "none")
            wanted = {n: -0.1 * p.grad for n, p in named(setting).items()}
            assert_named_close(plain.batch, wanted, 1e-12, "plain descent is the step that SGD takes")
            continue
        with pytest.raises(UserError, match=f"preconditioning={how} .*does not take.*preconditioning=actual"):
            upcoming_step(named(setting), optimizer, how)


@pytest.mark.parametrize("rollouts", ["current", "fresh"])
def test_along_a_whole_step_the_average_is_one_step_older_under_current(rollouts):
    """The batch's own sequences would meet themselves in it."""
    setting, keep = Setting.fresh(), 0.6
    optimizer = torch.optim.RMSprop(setting.model.parameters(), lr=1e-3)
    probe, gradients = make_probe(setting, rollouts=rollouts, averaging=keep), []
    for step in range(3):
        gradients.append(setting.gradients()[0])
        before = setting.values()
        setting.backward(step)
        probe.observe(setting.batch, setting.counting_scores())
        probe.before_step(optimizer)
        optimizer.step()
        known = gradients[: step + (rollouts == "fresh" or step == 0)]
        weights = [keep ** (len(known) - 1 - j) for j in range(len(known))]
        average = sum(w * g for w, g in zip(weights, known, strict=True)) / sum(weights)
        taken = difference(setting.values(), before)
        assert_close(probe.after_step().total.value, along(average, taken), 1e-9, f"step {step}")


def test_groups_of_ones_own_are_predicted_in_parts():
    """LoRA+ and its like: a rate, betas, epsilon and decay a group; labels beside; one parameter in no group, one frozen."""
    setting = Setting.fresh()
    names = [n for n, _ in setting.model.named_parameters()]
    frozen = dict(setting.model.named_parameters())[names[0]]
    groups = [
        {"params": [p for n, p in setting.model.named_parameters() if n in some], "name": label, **values}
        for label, some, values in (
            ("slow", [names[0], names[2]], {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.3}),
            ("fast", names[3:], {"lr": 1.6e-2, "betas": (0.5, 0.999), "eps": 1e-4, "weight_decay": 0.0}),
        )
    ]
    frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups)
    probe = make_probe(setting, estimator="rao_blackwell")
    for seed in range(3):
        chosen, training = setting.training(seed)
        optimizer.zero_grad()
        setting.model.zero_grad()
        scores = token_terms(setting.model, setting.space)[0].sum(1)[chosen]
        (-(training.weights * scores).sum()).backward()
        before = setting.values()
        leaves = {n: v.requires_grad_(n != names[0]) for n, v in detached_parameters(setting.model).items()}
        h = exact_entropies(setting.model, setting.space, parameters=leaves)[1]
        found = torch.autograd.grad(h, [leaves[n] for n in names[1:]])
        probe.observe(setting.batch, setting.counting_scores())
        probe.before_step(optimizer)
        optimizer.step()
        change, taken = probe.after_step(), difference(setting.values(), before)
        wanted = sum(float((g * taken[n]).sum()) for n, g in zip(names[1:], found, strict=True))
        assert_close(change.total.value, wanted, 1e-8, "rate, betas or decay of another group")
        assert not taken[names[0]].any() and not taken[names[1]].any() and taken[names[2]].any()
        assert change.momentum.value != 0 or seed == 0
        assert change.decay.value != 0
        parts = change.batch.value + change.momentum.value + change.decay.value
        assert parts == pytest.approx(change.total.value, rel=1e-12)


def test_an_optimizer_that_steps_during_the_backward_pass_is_refused(setting):
    """It leaves no gradients behind, and the step it takes when asked is none."""
    probe = make_probe(setting)
    probe.observe(setting.batch, setting.counting_scores())
    setting.model.zero_grad()
    with pytest.raises(UserError, match="no trained parameter has a gradient"):
        probe.before_step(setting.optimizer)


def test_a_step_that_a_scaler_skips_is_no_step():
    """Half precision overflowed: gradients are not finite, and weights stay."""
    setting = Setting.fresh()
    for seed in range(2):
        setting.step(seed)
    for optimizer in (setting.optimizer, torch.optim.SGD(setting.model.parameters(), lr=0.1)):
        probe = make_probe(setting, per_completion=True)
        setting.backward(2)
        next(setting.model.parameters()).grad.fill_(math.inf)
        probe.observe(setting.batch, setting.counting_scores())
        with warnings.catch_warnings():
            warnings.simplefilter("error" if optimizer is setting.optimizer else "ignore")
            probe.before_step(optimizer)
            change = probe.after_step()
        assert change.total.value == 0.0 == change.measured.change == change.per_completion.total.value
        if optimizer is setting.optimizer:
            assert change.batch.value == change.momentum.value == change.decay.value == 0.0
            setting.backward(2)  # the next one is split again
            assert not math.isnan(setting.watched_step(2, probe).batch.value)


def test_weights_that_round_the_step_away_are_predicted_along_what_is_left():
    """bfloat16 takes hardly anything of a step of 1e-5: its parts would be of a step that is not taken."""
    setting = Setting.fresh()
    model = setting.model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    probe = make_probe(setting, estimator="rao_blackwell")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    probe.observe(setting.batch)
    gradient = probe._newest["token"].total()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    probe.before_step(optimizer)
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="less than float32"):
        change = probe.after_step()
    wanted = sum(
        float((gradient[n].double() * (p.detach() - before[n]).double()).sum()) for n, p in model.named_parameters()
    )
    assert change.total.value == pytest.approx(wanted, rel=1e-4) and math.isnan(change.batch.value)


def test_parameters_that_the_optimizer_does_not_train_do_not_move(setting):
    some = [p for n, p in setting.model.named_parameters() if n != "mix.weight"]
    optimizer = torch.optim.AdamW(some, weight_decay=0.1)
    for how in ("actual", "none"):
        update = upcoming_step(named(setting), optimizer, how)
        assert not update.total()["mix.weight"].any() and update.total()["head.weight"].any()
        assert not step_per_gradient(named(setting), optimizer, how)["mix.weight"].any()
    assert why_not_split(named(setting), optimizer) is None


def test_wrapped_optimizers_are_opened(setting):
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    for how in MODES:
        inner = upcoming_step(named(setting), setting.optimizer, how)
        wrapped = upcoming_step(named(setting), Wrapper(setting.optimizer), how)  # type: ignore[arg-type]
        assert_named_close(wrapped.batch, inner.batch, 1e-12, how)


# ---------------------------------------------------------------------- whether it was taken
def broken(setting: Setting, how: str) -> None:
    """Something that makes the step another one than its parts say."""
    if how == "gradients changed":
        for p in setting.model.parameters():
            p.grad.mul_(-1.0)
    if how == "another rate":
        for group in setting.optimizer.param_groups:
            group["lr"] *= 1.5
    setting.optimizer.step()
    if how == "weights altered":
        with torch.no_grad():
            setting.model.head.weight.clamp_(-0.3, 0.3)


@pytest.mark.parametrize("how", ["gradients changed", "another rate", "weights altered"])
def test_a_step_that_was_not_taken_as_predicted_is_predicted_along_what_was_taken(how):
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    probe = make_probe(setting)
    gradient, before = setting.gradients()[0], setting.values()
    probe.observe(setting.batch, setting.counting_scores())
    setting.backward(3)
    probe.before_step(setting.optimizer)
    broken(setting, how)
    with pytest.warns(RuntimeWarning, match="did not take the AdamW step.*relative difference"):
        change = probe.after_step()
    wanted = along(gradient, difference(setting.values(), before))
    assert_close(change.total.value, wanted, 1e-9, "the step that was taken, not the one foretold")
    assert math.isnan(change.batch.value) and math.isnan(change.same_tokens), "of the step foretold"
    assert probe.after_step() is None, "the step is still held"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        gradient, before = setting.gradients()[0], setting.values()
        change = setting.watched_step(4, probe)
    assert_close(change.total.value, along(gradient, difference(setting.values(), before)), 1e-9, "the next step")


def test_a_step_that_was_not_taken_as_predicted_has_no_shares():
    """Those computed before it are of another step: they were left beside a batch part that is not a number."""
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    probe = make_probe(setting, mode="attribution")
    probe.observe(setting.batch, setting.counting_scores())
    setting.backward(3)
    probe.before_step(setting.optimizer, setting.training(3)[1])
    broken(setting, "gradients changed")
    with pytest.warns(RuntimeWarning, match="no shares of training sequences"):
        change = probe.after_step()
    assert change is not None and change.shares is None and change.effects is None


@pytest.mark.parametrize("how", ["previous_step", "none"])
def test_counterfactual_steps_are_not_held_against_the_one_taken(setting, how):
    probe = make_probe(setting, preconditioning=how)
    probe.observe(setting.batch, setting.counting_scores())
    with pytest.warns(RuntimeWarning, match="not the one that AdamW takes"):
        probe.before_step(setting.optimizer)
    broken(setting, "another rate")
    assert probe.after_step() is not None


def test_rounding_of_the_weights_is_allowed_for_and_no_more():
    """Float32 weights of size one cannot take steps of 1e-9; those of size 1e-9 can."""
    expected = {"a": torch.full((4,), 1e-9)}
    big, small = {"a": torch.ones(4)}, {"a": torch.full((4,), 1e-7)}
    assert unexplained(big, big, expected) is None
    assert unexplained(small, small, expected) == pytest.approx(1.0)
    assert unexplained(small, {"a": small["a"] + 1e-9}, expected) is None
    assert unexplained(small, {"a": small["a"] + 1.005e-9}, expected) is None
    assert unexplained(small, {"a": small["a"] + 1.05e-9}, expected) == pytest.approx(0.05, rel=0.1)
    assert unexplained(small, small, {"a": torch.full((4,), math.nan)}) is not None
    halves = {"a": torch.ones(4, dtype=torch.bfloat16)}
    assert unexplained(halves, halves, {"a": torch.full((4,), 1e-3, dtype=torch.bfloat16)}) == pytest.approx(1.0)


def test_rates_are_those_of_the_parameters_own_group(setting):
    rates = by_group(setting.model, RATES)
    plain = upcoming_step(named(setting), setting.optimizer, "none")
    for name, p in named(setting).items():
        assert_close(plain.batch[name], -rates[name] * p.grad, 1e-12, f"rate of {name}")
