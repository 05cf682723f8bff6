"""Every optimizer and every schedule that torch has: the predicted total is the exact change along the step, or it is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from rl_training.errors import UserError
from tests.oracle.comparison import assert_close
from tests.rl_training.probe_setting import Setting, along, difference, make_optimizer, make_probe

FOUND = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
DENSE = sorted(FOUND.keys() - {"SparseAdam"})  # it refuses gradients that are not sparse, which no policy has

# Settings under which a class takes another step.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"maximize": True}],
    "AdamW": [{"amsgrad": True}, {"maximize": True}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.0}],
    "Adam": [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"amsgrad": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "NAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "Adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "LBFGS": [{"line_search_fn": "strong_wolfe"}],
    "Muon": [{"nesterov": False, "weight_decay": 0.0}],
}
CASES = [(name, more) for name in DENSE for more in [{}, *VARIANTS.get(name, [])]]
PARTS = {"AdamW", "Adam"}


def optimizer_of(setting: Setting, name: str, more: dict[str, Any]) -> torch.optim.Optimizer:
    parameters = list(setting.model.parameters())
    if name == "Muon":  # of matrices alone: the others stay where they are
        parameters = [p for p in parameters if p.dim() == 2]
    return FOUND[name](parameters, **{"lr": 1e-3, **more})


def step(setting: Setting, probe: Any, optimizer: torch.optim.Optimizer, seed: int) -> tuple[Any, float]:
    """One watched step: what the probe says of it, and the exact gradient of entropy along it."""
    gradient, before = setting.gradients()[0], setting.values()

    def closure() -> torch.Tensor:
        setting.backward(seed, norm=1e9)
        return torch.tensor(0.0) if type(optimizer).__name__ != "LBFGS" else loss_of(setting, seed)

    closure()
    probe.observe(setting.batch, setting.counting_scores())
    probe.before_step(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        optimizer.step()
    return probe.after_step(), along(gradient, difference(setting.values(), before))


def loss_of(setting: Setting, seed: int) -> torch.Tensor:
    from tests.oracle.enumeration import token_terms

    chosen, training = setting.training(seed)
    with torch.no_grad():
        return -(training.weights * token_terms(setting.model, setting.space)[0].sum(1)[chosen]).sum()


@pytest.mark.long
@pytest.mark.parametrize(("name", "more"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
def test_the_total_is_the_exact_change_along_the_step(name, more):
    setting = Setting.fresh()
    optimizer = optimizer_of(setting, name, more)
    probe = make_probe(setting, estimator="rao_blackwell")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            change, wanted = step(setting, probe, optimizer, seed)
            assert wanted != 0
            assert_close(change.total.value, wanted, 1e-9, f"<grad h, step taken> in step {seed}")
            parts = [change.batch.value, change.momentum.value, change.decay.value]
            if not math.isnan(parts[0]):
                assert name in PARTS and sum(parts) == pytest.approx(change.total.value, rel=1e-12)
    said = [w for w in caught if "without parts" in str(w.message)]
    assert len(said) == math.isnan(change.batch.value), "no parts, and no word of it"


def test_every_class_was_tried_or_cannot_train_a_policy():
    """A class that torch adds is tried by itself; SparseAdam ends the step with torch's own words."""
    assert {name for name, _ in CASES} | {"SparseAdam"} == FOUND.keys() and len(FOUND) >= 13
    setting = Setting.fresh()
    optimizer = torch.optim.SparseAdam(setting.model.parameters())
    probe = make_probe(setting)
    with (
        pytest.warns(RuntimeWarning, match="SparseAdam is not AdamW"),
        pytest.raises(RuntimeError, match="SparseAdam does not support dense"),
    ):
        step(setting, probe, optimizer, 0)
    with pytest.raises(UserError, match="SparseAdam"):
        make_probe(setting, preconditioning="previous_step").examine(optimizer)


SCHEDULES = {
    "none": None,
    "constant": lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "constant at a part": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda n: min(1.0, n / 2)),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.3),
    "one cycle, which moves betas": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=6),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=False),
    "by group": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1.0, lambda n: 0.5**n]),
    "one after another": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_step_is_that_of_the_rate_at_which_it_is_taken(name):
    """Parts at today's rate and betas, also where the schedule has moved them since the moments were made."""
    setting = Setting.fresh()
    optimizer = make_optimizer(setting.model)
    schedule = None if (make := SCHEDULES[name]) is None else make(optimizer)
    probe = make_probe(setting, estimator="rao_blackwell")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the probe has nothing to say: its split is the step
        for seed in range(4):
            rates = [group["lr"] for group in optimizer.param_groups]
            change, wanted = step(setting, probe, optimizer, seed)
            assert abs(change.total.value - wanted) <= 1e-9 * abs(wanted) + 1e-15 and (wanted != 0) == any(rates)
            parts = change.batch.value + change.momentum.value + change.decay.value
            assert parts == pytest.approx(change.total.value, rel=1e-12, abs=1e-15)
            assert not any(rates) or change.batch.value != 0
            if schedule is not None:
                schedule.step()
