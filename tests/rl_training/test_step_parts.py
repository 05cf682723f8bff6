"""What the optimizer is about to do, in parts, and whether it did it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rl_training.algs.step_parts import check_step_taken, step_per_gradient, upcoming_step
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.enumeration import flatten
from tests.rl_training.probe_setting import RATES, Setting, by_group, difference, make_probe

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


OTHER_OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "couples weight decay": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_that_take_another_step_are_refused_by_name(setting, name):
    optimizer = OTHER_OPTIMIZERS[name](setting.model.parameters())
    for how in ("actual", "previous_step"):
        with pytest.raises((TypeError, ValueError), match=name):
            upcoming_step(named(setting), optimizer, how)
    rate = 0.1
    plain = upcoming_step(named(setting), optimizer, "none")
    wanted = {n: -rate * p.grad for n, p in named(setting).items()}
    assert_named_close(plain.batch, wanted, 1e-12, "a plain gradient step needs learning rates alone")


def test_parameters_that_the_optimizer_does_not_train_are_named(setting):
    some = [p for n, p in setting.model.named_parameters() if n != "mix.weight"]
    for how in MODES:
        with pytest.raises(ValueError, match="mix.weight"):
            upcoming_step(named(setting), torch.optim.AdamW(some), how)


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
def test_a_step_that_was_not_taken_as_predicted_is_an_error(how):
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    probe = make_probe(setting)
    probe.observe(setting.batch, setting.counting_scores())
    setting.backward(3)
    probe.before_step(setting.optimizer)
    broken(setting, how)
    with pytest.raises(ValueError, match="did not take the AdamW step.*relative difference"):
        probe.after_step()
    assert probe.after_step() is None, "the failed step is still held"


@pytest.mark.parametrize("how", ["previous_step", "none"])
def test_counterfactual_steps_are_not_held_against_the_one_taken(setting, how):
    probe = make_probe(setting, preconditioning=how)
    probe.observe(setting.batch, setting.counting_scores())
    probe.before_step(setting.optimizer)
    broken(setting, "another rate")
    assert probe.after_step() is not None


def test_rounding_of_the_weights_is_allowed_for_and_no_more():
    """Float32 weights of size one cannot take steps of 1e-9; those of size 1e-9 can."""
    expected = {"a": torch.full((4,), 1e-9)}
    big, small = {"a": torch.ones(4)}, {"a": torch.full((4,), 1e-7)}
    check_step_taken(big, big, expected)
    with pytest.raises(ValueError, match="did not take"):
        check_step_taken(small, small, expected)
    check_step_taken(small, {"a": small["a"] + 1e-9}, expected)
    check_step_taken(small, {"a": small["a"] + 1.005e-9}, expected)
    with pytest.raises(ValueError, match="did not take"):
        check_step_taken(small, {"a": small["a"] + 1.05e-9}, expected)
    halves = {"a": torch.ones(4, dtype=torch.bfloat16)}
    check_step_taken(halves, halves, {"a": torch.full((4,), 1e-3, dtype=torch.bfloat16)})


def test_rates_are_those_of_the_parameters_own_group(setting):
    rates = by_group(setting.model, RATES)
    plain = upcoming_step(named(setting), setting.optimizer, "none")
    for name, p in named(setting).items():
        assert_close(plain.batch[name], -rates[name] * p.grad, 1e-12, f"rate of {name}")
