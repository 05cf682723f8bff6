"""The self-check of AdamW's split: small learning rates pass, which float32 weights round away, and a wrong split does not."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from entropy_core.adamw import AdamWParameterState
from entropy_core.formed import Formed
from entropy_experiments.step import kernel_checks
from entropy_experiments.step.optimizer_step import NextStep


def step(rate: float, size: float) -> NextStep:
    """Of 4,000 weights of about `size`, whose optimizer has seen ten steps."""
    generator = torch.Generator().manual_seed(0)
    weights, gradient, momentum = (torch.randn(4000, generator=generator) for _ in range(3))
    state = AdamWParameterState(momentum, momentum.square(), 10, rate, 0.9, 0.999, 1e-8, 0.0)
    return NextStep({"w": torch.nn.Parameter(size * weights)}, {"w": gradient}, 1.0, 1.0, {"w": state}, frozenset())


def checked(of: NextStep):
    with patch.object(kernel_checks, "check_optimizer_entries"):
        return kernel_checks.check_optimizer(of, of.gradient, None)[0]


@pytest.mark.parametrize("rate", [1e-2, 5e-6])
def test_rounding_of_the_weights_passes(rate: float) -> None:
    assert checked(step(rate, 1.0)).passed


def test_a_step_that_is_rounded_away_does_not_pass() -> None:
    assert not checked(step(1e-8, 1.0)).passed


@pytest.mark.parametrize("rate", [1e-2, 5e-6])
def test_a_batch_part_that_is_off_does_not_pass(rate: float) -> None:
    of = step(rate, 1.0)
    update = of.update
    off = Formed(
        update.batch, lambda name: 1.05 * update.batch[name] + update.momentum[name] + update.weight_decay[name]
    )
    of.__dict__["sum_of_parts"] = off  # where a cached property lies
    assert not checked(of).passed
