"""The running average of gradients against its formula."""

from __future__ import annotations

import pytest
import torch

from entropy_core.fold_gradients import FoldGradients
from entropy_core.processes import Processes
from rl_training.probe.running_gradient import RunningGradient


def gradient(seed: int, folds: int = 3) -> FoldGradients:
    generator = torch.Generator().manual_seed(seed)
    return FoldGradients({"a": torch.randn(folds, 4, generator=generator, dtype=torch.float64)}, Processes())


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_the_average_is_the_weighted_mean_of_all_gradients_so_far(keep: float) -> None:
    average = RunningGradient(keep)
    assert average.value is None
    for newest in range(5):
        average.add(gradient(newest))
        weights = [keep ** (newest - j) for j in range(newest + 1)]
        wanted = sum(w * gradient(j).folds["a"] for j, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(average.value.folds["a"], wanted, rtol=1e-12, atol=1e-12)


def test_what_lies_steps_apart_is_forgotten_step_by_step() -> None:
    """A gradient taken every third step weighs keep^3, not keep: forgetting by refresh lags three times as far."""
    average, keep = RunningGradient(0.8), 0.8
    for newest in range(4):
        average.add(gradient(newest), 3)
    assert average.value is not None
    weights = [keep ** (3 * (3 - j)) for j in range(4)]
    wanted = sum(w * gradient(j).folds["a"] for j, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(average.value.folds["a"], wanted, rtol=1e-12, atol=1e-12)


def test_another_number_of_folds_begins_anew() -> None:
    average = RunningGradient(0.5)
    average.add(gradient(0))
    average.add(gradient(1, folds=2))
    torch.testing.assert_close(average.value.folds["a"], gradient(1, folds=2).folds["a"])
    average.add(gradient(2, folds=2))
    wanted = (0.5 * gradient(1, 2).folds["a"] + gradient(2, 2).folds["a"]) / 1.5
    torch.testing.assert_close(average.value.folds["a"], wanted)
