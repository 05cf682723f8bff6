"""Shares and effects without each evaluation prompt: against gradients of entropy on the buffers without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_core.entropy import Estimator
from entropy_core.gradients import entropy_gradient
from entropy_core.scores import token_statistics
from entropy_experiments.analyses.left_out_evaluation_prompts import interval_columns, without_each_prompt
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.effects_of_leaving_out import effects_of_leaving_out
from entropy_experiments.step.gradient_rows import KeptRows
from entropy_experiments.step.shares import attribute
from tests.entropy_experiments.analyses.tiny_step import make_step, sample_batch


@pytest.mark.parametrize("estimator", ["rao_blackwell", "fixed_prefix"])
@pytest.mark.parametrize("max_norm", [None, 1e-3], ids=["not clipped", "clipped"])
def test_numbers_without_a_prompt_are_those_of_a_buffer_without_it(
    estimator: Estimator, max_norm: float | None
) -> None:
    tiny = make_step(max_norm=max_norm, settled=False)
    evaluation = sample_batch(tiny.model, 5, 3, torch.Generator().manual_seed(3))
    statistics, rows = token_statistics(tiny.model, evaluation), KeptRows(tiny.columns)
    loss = rows.weighted_gradient(tiny.weights)

    def numbers_of(gradient) -> tuple[Tensor, Tensor]:
        products = attribute(gradient, rows, tiny.weights, tiny.step).products
        return products, effects_of_leaving_out(gradient, loss, rows, tiny.weights, tiny.step)

    found = without_each_prompt(tiny.model, evaluation, statistics, estimator, numbers_of)
    assert found is not None and found.prompts.tolist() == [0, 1, 2, 3, 4]
    for prompt in range(5):
        kept = evaluation.select((evaluation.prompt_index != prompt).nonzero().flatten().tolist())
        products, effects = numbers_of(entropy_gradient(tiny.model, kept, estimator))
        np.testing.assert_allclose(found.products[prompt], products, rtol=1e-8, atol=1e-8 * float(products.abs().max()))
        np.testing.assert_allclose(found.effects[prompt], effects, rtol=1e-8, atol=1e-8 * float(effects.abs().max()))
    low, high = interval_columns(products.numpy(), found.products)
    one = jackknife_interval(float(products[3]), found.products[:, 3])
    assert (low[3], high[3]) == (one.low, one.high) and np.isfinite(low).all()


def test_a_single_prompt_says_nothing_of_errors() -> None:
    tiny = make_step()
    evaluation = sample_batch(tiny.model, 1, 4, torch.Generator().manual_seed(3))
    statistics = token_statistics(tiny.model, evaluation)
    assert (
        without_each_prompt(tiny.model, evaluation, statistics, "rao_blackwell", lambda g: pytest.fail("asked")) is None
    )
