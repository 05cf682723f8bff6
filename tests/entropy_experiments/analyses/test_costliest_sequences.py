"""Which training sequences cost most entropy, by some of the evaluation prompts: from the kernel's pass, or from a gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entropy_core.passes.settings import DEFAULT_PASSES
from entropy_experiments.analyses import adapters
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.fisher_analyzer import analyze_batches
from entropy_experiments.statistics.estimand import Estimand
from entropy_experiments.step.settings import AnalysisSettings
from tests.entropy_experiments.analyses.tiny_step import make_step, sample_batch


@pytest.mark.parametrize("settled", [False, True], ids=["early: by effect", "late: by share"])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
def test_both_ways_find_the_same_costs(settled: bool, drawn: bool) -> None:
    tiny = make_step(max_norm=1e-3, settled=settled)
    evaluation = sample_batch(tiny.model, 6, 3, torch.Generator().manual_seed(5))
    settings = AnalysisSettings(Estimand.of(drawn), max_grad_norm=1e-3, measure=False)
    found = analyze_batches(tiny.model, tiny.optimizer, evaluation, tiny.train, tiny.weights, settings)
    inputs: Any = SimpleNamespace(
        model=tiny.model, eval_batch=evaluation, numbers=found.numbers, side=found.training, config=None
    )
    inputs.decisive = AnalysisInputs.decisive.func(inputs)
    chosen = evaluation.prompt_index % 2 == 0
    rows = chosen.nonzero().flatten()
    some = (evaluation.select(rows.tolist()), found.numbers.eval_statistics.select(rows))
    by_gradient = adapters._cost_by_gradient(inputs, *some, DEFAULT_PASSES)
    ours = adapters._cost_by_contributions(inputs, chosen)
    assert ours is not None and ours.tolist() == pytest.approx(
        by_gradient.tolist(), rel=1e-4, abs=1e-4 * _size(by_gradient)
    )
    everyone = adapters._cost_by_contributions(inputs, torch.ones_like(chosen))
    assert everyone is not None and float((ours - everyone).abs().max()) > 1e-2 * _size(by_gradient), (
        "others judge otherwise"
    )
    listed = adapters._costliest(inputs, chosen, DEFAULT_PASSES)
    assert listed is not None and ours[listed].tolist() == sorted(ours[ours < 0].tolist())


def _size(values: torch.Tensor) -> float:
    return float(values.abs().max())
