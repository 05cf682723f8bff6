"""Weights that are frozen in the course of a run: torch moves them on as long as they have a gradient, be it zeros."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.rl_training.probe_setting import Setting, make_probe


def _said_of_a_step(set_to_none: bool) -> tuple[list[str], bool]:
    """Warnings of a step after one parameter was frozen, and whether that parameter moved."""
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    frozen = next(iter(setting.model.parameters()))
    frozen.requires_grad_(False)
    setting.optimizer.zero_grad(set_to_none=set_to_none)
    if not set_to_none:
        assert frozen.grad is not None
    before, zeros = frozen.detach().clone(), frozen.grad
    probe = make_probe(setting)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        probe.observe(setting.batch, setting.counting_scores())
        setting.backward(3)
        frozen.grad = zeros  # of a loop that keeps its gradients' memory
        probe.before_step(setting.optimizer)
        setting.optimizer.step()
        probe.after_step()
    moved = not torch.equal(before, frozen)
    return [str(w.message) for w in said if "requires no gradient" in str(w.message)], moved


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_weights_that_the_optimizer_still_moves_are_named(set_to_none):
    said, moved = _said_of_a_step(set_to_none)
    assert moved is not set_to_none
    assert len(said) == moved
    if moved:
        assert "`predicted` leaves that out" in said[0]
