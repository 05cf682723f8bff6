"""Clipping of the loss gradient: torch's own coefficient, in the step and in every share of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from entropy_experiments.step.optimizer_step import clip_coefficient, plain_step
from entropy_experiments.step.shares import attribute

SHAPES = {"a": (3, 2), "b": (4,)}


def random_like(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("max_norm", [None, 0.0, 0.05, 1.0, 1e3])
def test_the_coefficient_is_torchs(max_norm: float | None) -> None:
    gradient = random_like(0)
    found, norm = clip_coefficient(gradient, max_norm)
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradient.values()]
    for parameter, g in zip(parameters, gradient.values(), strict=True):
        parameter.grad = g.clone()
    theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    assert norm == pytest.approx(float(theirs), rel=1e-12)
    for parameter, g in zip(parameters, gradient.values(), strict=True):
        torch.testing.assert_close(found * g, parameter.grad, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_shares_add_up_to_the_step_that_is_clipped(max_norm: float | None) -> None:
    """sum_i dh_i = <grad h, -lr c g> with g = -sum_i w_i dS_i."""
    of_entropy, sequences = random_like(1), [random_like(seed) for seed in range(2, 7)]
    weights = torch.linspace(-0.5, 0.7, len(sequences), dtype=torch.float64)
    gradient = {n: -sum(w * s[n] for w, s in zip(weights, sequences, strict=True)) for n in SHAPES}

    def products(direction: Any) -> torch.Tensor:
        return torch.stack([torch.stack([(s[n] * direction[n]).sum() for n in SHAPES]).sum() for s in sequences])

    step = plain_step(cast(Any, gradient), max_norm, 1e-2)
    assert (step.clip < 1) is (max_norm is not None)
    found = attribute(of_entropy, cast(Any, SimpleNamespace(products=products)), weights, step)
    expected = sum(float((of_entropy[n] * step.parameter_delta[n]).sum()) for n in SHAPES)
    assert float(found.shares.sum()) == pytest.approx(expected, rel=1e-12)
