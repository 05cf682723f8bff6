"""Shares and effects without each evaluation prompt: against gradients of entropy on the buffers without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_core.gradients import entropy_gradient
from entropy_core.scores import token_statistics
from entropy_experiments.analyses.left_out_evaluation_prompts import interval_columns, without_each_prompt
from entropy_experiments.fisher_analyzer import analyze_batches
from entropy_experiments.statistics.estimand import Estimand
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.effects_of_leaving_out import effects_of_leaving_out
from entropy_experiments.step.gradient_rows import KeptRows
from entropy_experiments.step.settings import AnalysisSettings
from entropy_experiments.step.shares import attribute
from tests.entropy_experiments.analyses.tiny_step import make_step, sample_batch


@pytest.mark.long
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
@pytest.mark.parametrize("max_norm", [None, 1e-3], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("settled", [False, True], ids=["early", "late"])
def test_numbers_without_a_prompt_are_those_of_a_buffer_without_it(
    drawn: bool, max_norm: float | None, settled: bool
) -> None:
    tiny = make_step(max_norm=max_norm, settled=settled)
    evaluation = sample_batch(tiny.model, 5, 3, torch.Generator().manual_seed(3))
    rows, estimand = KeptRows(tiny.columns), Estimand.of(drawn)
    loss = rows.weighted_gradient(tiny.weights)
    settings = AnalysisSettings(estimand, max_grad_norm=max_norm, measure=False)
    step = analyze_batches(tiny.model, tiny.optimizer, evaluation, tiny.train, tiny.weights, settings).numbers.step
    assert step is not None and step.by_evaluation is not None

    def numbers_of(gradient) -> tuple[Tensor, Tensor]:
        products = attribute(gradient, rows, tiny.weights, tiny.step).products
        return products, effects_of_leaving_out(gradient, loss, rows, tiny.weights, tiny.step)

    sums = token_statistics(tiny.model, evaluation).entropy_sums()
    found = without_each_prompt(step.by_evaluation, evaluation, sums)
    assert found is not None and found.prompts.tolist() == [0, 1, 2, 3, 4]
    whole = numbers_of(entropy_gradient(tiny.model, evaluation, estimand.gradient))
    for prompt in range(5):
        kept = evaluation.select((evaluation.prompt_index != prompt).nonzero().flatten().tolist())
        products, effects = numbers_of(entropy_gradient(tiny.model, kept, estimand.gradient))
        for ours, exact in ((found.products[prompt], products), (found.effects[prompt], effects)):
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
    for ours, exact in zip((found.products, found.effects), whole, strict=True):
        moved = np.abs(ours - exact.numpy()).max()
        assert moved > 1e-3 * float(exact.abs().max()), "without a prompt they are others"
    low, high = interval_columns(products.numpy(), found.products)
    one = jackknife_interval(float(products[3]), found.products[:, 3])
    assert (low[3], high[3]) == pytest.approx((float(one.low), float(one.high)), rel=1e-9) and np.isfinite(low).all()


def test_a_single_prompt_says_nothing_of_errors() -> None:
    tiny = make_step()
    evaluation = sample_batch(tiny.model, 1, 4, torch.Generator().manual_seed(3))
    settings = AnalysisSettings(Estimand.of(True), measure=False)
    step = analyze_batches(tiny.model, tiny.optimizer, evaluation, tiny.train, tiny.weights, settings).numbers.step
    assert step is not None and step.by_evaluation is not None
    sums = token_statistics(tiny.model, evaluation).entropy_sums()
    assert without_each_prompt(step.by_evaluation, evaluation, sums) is None
