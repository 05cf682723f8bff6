"""The controller on a policy whose completions are enumerated: level and gradient are exact, the step is AdamW's."""

from __future__ import annotations

import pytest
import torch

from rl_training.control.controller import EntropyController, StepToCome
from rl_training.controller_config import EntropyControllerConfig
from tests.oracle.enumeration import token_terms
from tests.rl_training.probe_setting import MAX_NORM, Setting, along, difference

SETTINGS = {"horizon": 1, "band": 0.0, "start_after": 0, "advantage_decay": 1.0, "max_change": 1.0, "alpha_min": -50.0}


def _controlled(rate: float, change: float) -> tuple[Setting, float, object, float]:
    """A step at `rate` times the usual learning rate that is to change h by `change`: (setting, h before, record, along)."""
    setting = Setting.fresh()
    for seed in range(4):
        setting.step(seed)
    for group in setting.optimizer.param_groups:
        group["lr"] *= rate
    before, gradient, values = setting.entropy(), setting.gradients()[0], setting.values()
    config = EntropyControllerConfig(**SETTINGS, target=before + change, alpha_max=50.0)
    controller = EntropyController(config, setting.model)
    chosen, _ = setting.training(7)
    controller.begin_step()
    setting.backward(7, norm=1e9)  # not clipped: that is for after the bonus
    entropies = token_terms(setting.model, setting.space)[1][chosen]
    controller.add_bonus(entropies.sum() / setting.batch.completion_lengths[chosen].sum())
    controller._own = float("nan")  # the subset's entropy is not the policy's, which is known exactly here
    coming = StepToCome(4, 100, MAX_NORM)
    record = controller.act(setting.optimizer, coming, setting.batch, lambda scores: torch.zeros_like(scores))
    torch.nn.utils.clip_grad_norm_(setting.model.parameters(), MAX_NORM)
    setting.optimizer.step()
    return setting, before, record, along(gradient, difference(setting.values(), values))


@pytest.mark.parametrize("change", [1e-4, 0.0])
def test_the_predicted_change_is_the_wanted_one_of_the_enumerated_gradient(change: float) -> None:
    _, before, record, taken = _controlled(0.01, change)
    assert record.entropy == pytest.approx(before, rel=1e-10), "the weights of the watched sequences are lost"
    assert record.predicted == pytest.approx(change, rel=2e-3, abs=2e-7) and not record.saturated
    assert taken == pytest.approx(record.predicted, rel=1e-6), (
        "the step that was taken is not the one that was solved for"
    )
    assert (record.predicted - record.without) * record.alpha > 0


def test_the_real_change_comes_to_the_wanted_one_as_steps_shrink() -> None:
    """Central to the claim: h itself, enumerated, after a real step of AdamW with clipping, momentum and decay."""
    off = {}
    for size in (4.0, 1.0):
        setting, before, record, _ = _controlled(0.01 * size, 1e-4 * size)
        off[size] = abs(setting.entropy() - before - 1e-4 * size) / (1e-4 * size)
        assert record.alpha != 0.0
    assert off[1.0] < 0.03 and off[1.0] < 0.6 * off[4.0] + 2e-3, f"the error is not of second order: {off}"


def test_inside_the_band_no_gradient_is_touched() -> None:
    setting = Setting.fresh()
    setting.step(0)
    setting.backward(7)
    before = [p.grad.clone() for p in setting.model.parameters()]
    config = EntropyControllerConfig(**{**SETTINGS, "band": 1e6}, target=setting.entropy(), alpha_max=50.0)
    controller = EntropyController(config, setting.model)
    controller.add_bonus(token_terms(setting.model, setting.space)[1].sum())
    record = controller.act(
        setting.optimizer, StepToCome(1, 9, MAX_NORM), setting.batch, lambda scores: torch.zeros_like(scores)
    )
    assert record.alpha == 0.0 and record.predicted == record.without
    assert all(torch.equal(p.grad, g) for p, g in zip(setting.model.parameters(), before, strict=True))
